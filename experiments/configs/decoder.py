"""Eight workers train a small byte-level decoder on Python's own standard library by Crossover-SGD.

    JAX_NUM_CPU_DEVICES=8 python experiments/train.py --config=experiments/configs/decoder.py --workdir=runs/decoder

Nothing is downloaded: the text is that of the modules that lie next to `os.py`, 4.7 MB in Python 3.11. After 400 steps,
347 s on two busy cores, the averaged model's loss is 1.609, which is 2.32 bits per byte (before, 8 and more), and it
guesses 57 % of the bytes. Every default is here; `--config.key=value` changes one.
"""

import sysconfig

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_workers = 8
    config.simulate = "auto"  # "yes": all workers on one device; "no": a mesh; "auto": "yes" where there is one device

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "text"
    config.dataset.data_dir = f"{sysconfig.get_path('stdlib')}/*.py"  # a file, a folder or a pattern of files
    config.dataset.train_split = "train"  # all but the last tenth of the bytes
    config.dataset.eval_split = "test[:25%]"
    config.dataset.augment = False
    config.dataset.sequence = 128  # bytes of an example

    config.model = ml_collections.ConfigDict()
    config.model.name = "decoder"
    config.model.options = ml_collections.ConfigDict(
        {
            "num_layers": 4,
            "width": 128,
            "num_heads": 4,
            "mlp_width": 384,
            "remat": False,  # compute each layer again for its gradient, and keep only its input
            "dtype": "float32",
        }
    )

    # A worker of several devices: over how many its parameters are sharded; the others share its examples.
    config.inner = ml_collections.ConfigDict()
    config.inner.fsdp = 1
    config.inner.tensor = 1  # for models that say how to split their layers (decoder)

    # A worker of several devices: over how many its parameters are sharded; the others share its examples.
    config.inner = ml_collections.ConfigDict()
    config.inner.fsdp = 1
    config.inner.tensor = 1

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "crossover"
    config.algorithm.during = False  # mix while the gradient is taken, not after the update
    config.algorithm.local_steps = 1  # optimizer steps between two rounds (crossover, local_sgd)
    config.algorithm.peers = 1  # messages per round (sgp)
    config.algorithm.pool_size = 0  # rounds in the pool; 0: chosen by the number of workers
    config.algorithm.segments = 0  # equal parts of the model; 0: as many as rounds
    config.algorithm.seed = 0  # of pool and table

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 4e-3
    config.optimizer.momentum = 0.9  # beta 1
    config.optimizer.beta2 = 0.95
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 0.1
    config.optimizer.warmup = 0.1  # part of all steps

    config.batch_size = 32  # of all workers together
    config.micro_batches = 1  # parts of a batch whose gradients are accumulated
    config.epochs = 0.0
    config.steps = 400
    config.log_every = 20  # steps
    config.eval_every = 1.0  # epochs
    config.eval_batch_size = 128  # on a mesh, a multiple of the number of devices
    return config
