"""Eight workers train a small ResNet on the full Fashion-MNIST by Crossover-SGD: what `make train` runs.

    python experiments/train.py --config=experiments/configs/fashion_mnist.py --workdir=runs/fashion_mnist

Every default is here; `--config.key=value` changes one.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_workers = 8
    config.simulate = "auto"  # "yes": all workers on one device; "no": a mesh; "auto": "yes" where there is one device

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "fashion_mnist"
    config.dataset.data_dir = "data"
    config.dataset.train_split = "train"
    config.dataset.eval_split = "test"
    config.dataset.augment = False  # random shifts and flips: worth it in longer runs
    config.dataset.sequence = 256  # bytes of an example (text)

    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet8"
    # The model's own options; another model takes others, --config.model.options="{'hidden': (32,)}".
    config.model.options = ml_collections.ConfigDict({"width": 16, "stem_stride": 2, "norm": "batch"})

    # A worker of several devices: over how many its parameters are sharded; the others share its examples.
    config.inner = ml_collections.ConfigDict()
    config.inner.fsdp = 1
    config.inner.tensor = 1  # for models that say how to split their layers (decoder)

    config.algorithm = ml_collections.ConfigDict()
    config.algorithm.name = "crossover"
    config.algorithm.during = False  # mix while the gradient is taken, not after the update
    config.algorithm.local_steps = 1  # optimizer steps between two rounds (crossover, local_sgd)
    config.algorithm.rounds = 1  # exchanges at each of them (crossover)
    config.algorithm.momentum_rounds = 0  # exchange the optimizer's momentum too, so often (crossover)
    config.algorithm.wire = "float32"  # or "bfloat16", "int8": what messages are sent in (crossover)
    config.algorithm.renew = 0  # exchange differences to a reference, renewed every so many steps; 0: none (crossover)
    config.algorithm.in_flight = 0  # channels under way at once; 0: all (crossover)
    config.algorithm.peers = 1  # messages per round (sgp)
    config.algorithm.pool = "latin"  # or "balanced", "derangements" (crossover)
    config.algorithm.pool_size = 0  # rounds in the pool; 0: chosen by the number of workers
    config.algorithm.segments = 0  # equal parts of the model; 0: as many as rounds, by rows 8
    config.algorithm.cut = "size"  # or "rows": of every large leaf (crossover)
    config.algorithm.seed = 0  # of pool and table

    config.optimizer = ml_collections.ConfigDict()
    config.optimizer.name = "sgd"  # or "lars", "adamw"
    config.optimizer.learning_rate = 0.1
    config.optimizer.momentum = 0.9  # of adamw, beta 1
    config.optimizer.beta2 = 0.95  # (adamw)
    config.optimizer.nesterov = False
    config.optimizer.weight_decay = 5e-4
    config.optimizer.warmup = 0.1  # part of all steps
    config.optimizer.decay = "cosine"  # to zero; or "polynomial"
    config.optimizer.power = 2.2  # (polynomial)
    config.optimizer.end = 0.0025  # part of the learning rate (polynomial)
    config.optimizer.tail = 0.0  # part of all steps at the end that stay there (polynomial)
    config.optimizer.trust_coefficient = 0.0025  # (lars, whose weight decay follows the learning rate)
    config.optimizer.average_norms = False  # trust ratios from norms averaged over workers (lars)

    config.batch_size = 256  # of all workers together
    config.label_smoothing = 0.0  # shared evenly by the other classes
    config.micro_batches = 1  # the paper's communication interval: parts of a batch whose gradients are accumulated
    config.epochs = 10.0
    config.steps = 0  # 0: from epochs
    config.log_every = 20  # steps
    config.eval_every = 1.0  # epochs
    config.eval_batch_size = 1024  # on a mesh, a multiple of the number of devices

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100  # steps; 0: none, and nothing to resume from
    config.checkpoint.keep = 2  # the last ones; that of the best averaged model is kept too
    config.on_nan = "stop"  # or "rollback": to the last checkpoint, the data in another order
    config.max_rollbacks = 2
    return config
