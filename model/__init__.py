"""The networks: builders by name, and which of their layers EC2T may touch.

A network is described by its *spec*, a plain dict with the builder's name and arguments, for example
`{"name": "cifar_micronet", "depth": 3.25, "width": 1.89, "num_classes": 100}`. Checkpoints carry it.
Importing this package does not import torch, so that command lines are parsed at once.
"""

EFFICIENTNETS = ("efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "efficientnet-b4")
LITES = ("efficientnet-lite1",)
MICRONETS = ("cifar_micronet", "imagenet_micronet")
MODELS = (*MICRONETS, *EFFICIENTNETS, *LITES, "resnet20")


def build(spec: dict):
    """Build the network that `spec` describes, with fresh random weights."""
    arguments = {key: value for key, value in spec.items() if key != "name"}
    name = spec["name"]
    if name in MICRONETS:
        from model.micronet import micronet

        return micronet(name, **arguments)
    if name in EFFICIENTNETS:
        from model.efficientnet import efficientnet

        return efficientnet(name, **arguments)
    if name == "efficientnet-lite1":
        from model.efficientnet import efficientnet_lite1

        return efficientnet_lite1(**arguments)
    if name == "resnet20":
        from model.resnet import resnet20

        return resnet20(**arguments)
    raise KeyError(f"unknown model {name!r}; known are {', '.join(MODELS)}")
