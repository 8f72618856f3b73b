"""Layers of given weights under EC2T, without a network around them."""

from torch import Tensor, nn

from model_quantization.quantized_layers import QuantizedLayers


def network_of(*weights: Tensor) -> nn.Module:
    network = nn.Module()
    for i, weight in enumerate(weights):
        network.register_parameter(f"w{i}", nn.Parameter(weight.clone()))
    return network


def layers_of(*weights: Tensor, s: float = 0.3, g: float = 0.15, **options) -> QuantizedLayers:
    return QuantizedLayers(network_of(*weights), [f"w{i}" for i in range(len(weights))], s, g, **options)
