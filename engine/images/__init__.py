"""From a folder of images to batches on the device.

datasets        the known data sets, one row of facts each
sources         what a name and a path mean: class folders, arrays, torchvision's sets, scikit-learn's digits
folders         which classes and image files are in class folders
survey          a look at every file: damage, contents, how bright white is
decoding        an image file as upright RGB
arrays          `.npz` files: data sets, and the cache of small images
preprocessing   how a network wants its photographs
augment         augmentation of small images
batches         what a stage asks for, and gets
"""
