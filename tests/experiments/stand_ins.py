"""Small archives in the real formats of data sets that only the user can bring."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from experiments.data import builders, raw, sources

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_ARCHIVE = "cifar-10-binary.tar.gz"


def tar_of(files, mode="w"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def encoded(height, width, mode="RGB", form="JPEG"):
    """A smooth image, as JPEG keeps it to a few grey levels."""
    ramp = np.linspace(0, 255, height * width).reshape(height, width).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)).convert(mode).save(buffer, form)
    return buffer.getvalue()


def prepare_imagenet(root):
    """Two classes in the layout of ILSVRC2012, with a CMYK JPEG and a PNG under the names that have them there."""
    classes = {
        "n01440764": {f"n01440764_{i}.JPEG": encoded(40 + i, 60) for i in range(4)},
        "n02105855": {
            raw.stock_imagenet.PNG_IMAGES[0]: encoded(50, 50, form="PNG"),
            raw.stock_imagenet.CMYK_IMAGES[0]: encoded(50, 50, mode="CMYK"),
            "n02105855_7.JPEG": encoded(50, 40, mode="L"),
        },
    }
    validation = {f"ILSVRC2012_val_0000000{i}.JPEG": encoded(30, 30 + i) for i in (2, 1, 3)}
    train = tar_of({f"{name}.tar": tar_of(files) for name, files in classes.items()})
    (root / "ILSVRC2012_img_train.tar").write_bytes(train)
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of(validation))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "imagenet_validation_labels", lambda: ["n01440764", "n02105855", "n01440764"])
        builders.prepare("imagenet2012", data_dir=root, manual_dir=root, num_shards=2)
    return root, classes, validation


def write_cifar10(folder, images, labels):
    """The archive of CIFAR-10 with these in six equal parts, the last for testing; its SHA-256."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    records = np.concatenate([labels[:, None], pixels], axis=1)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {name: part.tobytes() for name, part in zip(names, np.split(records, 6), strict=True)}
    files["batches.meta.txt"] = "\n".join(CIFAR10_CLASSES).encode() + b"\n\n"
    archive = tar_of({f"cifar-10-batches-bin/{name}": content for name, content in files.items()}, "w:gz")
    (folder / CIFAR10_ARCHIVE).write_bytes(archive)
    return hashlib.sha256(archive).hexdigest()


def prepare_cifar10(root, images, labels):
    digest = write_cifar10(root, images, labels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SHA256["cifar10"], CIFAR10_ARCHIVE, digest)
        return builders.prepare("cifar10", data_dir=root, manual_dir=root)
