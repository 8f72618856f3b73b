"""Predict a photograph from a file that `run_scoring.py --onnx` wrote, with onnxruntime, numpy and Pillow alone.

python examples/predict_onnx.py FILE.onnx IMAGE
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
image, size = Image.open(sys.argv[2]).convert("RGB"), about["image_size"]
scale = about.get("resize_shorter_side", size) / min(image.size)  # of photographs; then the centre is cut out
image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
left, top = ((side - size) // 2 for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
batch = ((pixels - about["mean"]) / about["std"]).transpose(2, 0, 1)[None].astype(np.float32)
(logits,) = session.run(None, {"images": batch})
for label in logits[0].argsort()[:-6:-1]:
    print(f"{logits[0, label]:8.3f}  {about['classes'][label] if 'classes' in about else label}")
