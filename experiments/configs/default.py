"""Every key of the config, with its default and what it means; the files beside this one change some of them.

    python -m experiments.train --config=experiments/configs/fashion_mnist.py --config.crossover.wire=int8

Each algorithm and each optimizer has a group of keys, named like it, and reads no other. A key of a group that is not
chosen must keep its default. What can be left out is None, on the command line too: `--config.crossover.wire=None`.
"""

import ml_collections
from ml_collections.config_dict import placeholder


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.num_workers = 8
    config.simulate = "auto"  # "yes": all workers on one device; "no": a mesh; "auto": "yes" where there is one device

    # A worker of several devices: over how many its parameters are sharded; the others share its examples.
    config.inner = ml_collections.ConfigDict()
    config.inner.fsdp = 1
    config.inner.tensor = 1  # for models that say how to split their layers (decoder)

    config.batch_size = 256  # of all workers together
    config.period = 1  # steps of one program, at whose end rows, evaluations, checkpoints and SIGTERM have their turn
    config.micro_batches = 1  # the paper's communication interval: parts of a batch whose gradients are accumulated
    config.label_smoothing = 0.0  # shared evenly by the other classes
    config.epochs = 10.0
    config.steps = placeholder(int)  # None: from epochs
    config.log_every = 20  # steps
    config.eval_every = 1.0  # epochs
    config.eval_batch_size = 1024  # on a mesh, a multiple of the number of devices
    config.on_nan = "stop"  # or "rollback": to the last checkpoint, the data in another order
    config.max_rollbacks = 2

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every = 100  # steps; None: no checkpoints, and nothing to resume from
    config.checkpoint.keep = 2  # the last ones; that of the best averaged model is kept too

    config.dataset = ml_collections.ConfigDict()
    config.dataset.name = "fashion_mnist"
    config.dataset.data_dir = "data"
    config.dataset.train_split = "train"
    config.dataset.eval_split = "test"
    config.dataset.augment = False  # random shifts and flips: worth it in longer runs
    config.dataset.sequence = 256  # bytes of an example (text)

    config.model = ml_collections.ConfigDict()
    config.model.name = "resnet8"
    # The model's own options; another model takes others: --config.model.options="{'hidden': (32,)}".
    config.model.options = ml_collections.ConfigDict()

    add_schedule(config)
    add_optimizers(config)
    add_algorithms(config)
    return config


def add_schedule(config: ml_collections.ConfigDict) -> None:
    """The learning rate over time, of every optimizer."""
    config.schedule = ml_collections.ConfigDict()
    config.schedule.learning_rate = 0.1  # the highest
    config.schedule.warmup = 0.1  # part of all steps
    config.schedule.decay = "cosine"  # or "polynomial"

    config.schedule.cosine = ml_collections.ConfigDict()
    config.schedule.cosine.end = 0.0  # part of the learning rate

    config.schedule.polynomial = ml_collections.ConfigDict()
    config.schedule.polynomial.power = 2.2
    config.schedule.polynomial.end = 0.0025  # part of the learning rate
    config.schedule.polynomial.tail = 0.0  # part of all steps, at the end, that stay there


def add_optimizers(config: ml_collections.ConfigDict) -> None:
    """Weight decay is of matrices and filters only."""
    config.optimizer = "sgd"  # or "lars", "adamw", "gossip_adamw", "oracle_adamw", "muon"
    config.clip_norm = placeholder(float)  # the longest gradient, a worker's own or "allreduce"'s average; None: any

    config.sgd = ml_collections.ConfigDict()
    config.sgd.momentum = 0.9
    config.sgd.nesterov = False
    config.sgd.weight_decay = 5e-4

    config.lars = ml_collections.ConfigDict()
    config.lars.momentum = 0.9
    config.lars.nesterov = False
    config.lars.weight_decay = 5e-4  # follows the learning rate
    config.lars.coefficient = 0.0025  # of trust
    config.lars.average_norms = False  # trust ratios from norms averaged over workers

    config.adamw = ml_collections.ConfigDict()
    config.adamw.b1 = 0.9
    config.adamw.b2 = 0.95
    config.adamw.nesterov = False
    config.adamw.weight_decay = 5e-4

    config.gossip_adamw = ml_collections.ConfigDict()  # with the second moment of the average gradient
    config.gossip_adamw.b1 = 0.9
    config.gossip_adamw.b2 = 0.99
    config.gossip_adamw.weight_decay = 5e-4

    config.oracle_adamw = ml_collections.ConfigDict()  # the second moment by an all-reduce: to compare with only
    config.oracle_adamw.b1 = 0.9
    config.oracle_adamw.b2 = 0.99
    config.oracle_adamw.weight_decay = 5e-4

    config.muon = ml_collections.ConfigDict()  # of the layers of a decoder; all else by AdamW with Nesterov's momentum
    config.muon.beta = 0.95
    config.muon.b2 = 0.95  # AdamW's
    config.muon.weight_decay = 5e-4


def add_algorithms(config: ml_collections.ConfigDict) -> None:
    """Of "alone", "allreduce" and "d_psgd" there is nothing to choose."""
    config.algorithm = "crossover"  # or "alone", "allreduce", "d_psgd" and those below, "outer" among them

    config.crossover = ml_collections.ConfigDict()
    config.crossover.pool = "latin"  # or "balanced", "derangements"
    config.crossover.pool_size = placeholder(int)  # rounds in the pool; None: chosen by the number of workers
    config.crossover.cut = "size"  # or "rows": of every large leaf
    config.crossover.segments = placeholder(int)  # equal parts of the model; None: as many as rounds, of rows 8
    config.crossover.seed = 0  # of pool and table
    config.crossover.wire = placeholder(str)  # "bfloat16", "float16", "int8", "int4" in messages; None: as they are
    config.crossover.in_flight = placeholder(int)  # messages under way at once; None: all
    config.crossover.local_steps = 1  # optimizer steps between two exchanges
    config.crossover.rounds = 1  # of each exchange
    config.crossover.momentum_rounds = placeholder(int)  # so many of the optimizer's momentum too; None: it stays
    config.crossover.renew_every = placeholder(int)  # steps; differences to a reference travel. None: the model itself
    config.crossover.during = False  # mix while the gradient is taken, not after the update

    config.crossover_phases = ml_collections.ConfigDict()
    config.crossover_phases.during = False

    config.crossover_paper = ml_collections.ConfigDict()
    config.crossover_paper.pool_size = 16
    config.crossover_paper.segments = placeholder(int)  # equal parts of the model; None: cut at layers, as the paper
    config.crossover_paper.load_balanced = True  # False: workers pull from peers who were not asked first
    config.crossover_paper.seed = 0

    config.local_sgd = ml_collections.ConfigDict()
    config.local_sgd.local_steps = 1  # between two averages

    config.sgp = ml_collections.ConfigDict()
    config.sgp.peers = 1  # messages per round

    # DiLoCo and its kin: after each `every` steps an outer step of SGD with momentum on what they have changed.
    config.outer = ml_collections.ConfigDict()
    config.outer.mix = "crossover"  # or "average": DiLoCo
    config.outer.every = 16  # inner steps
    config.outer.learning_rate = 0.7
    config.outer.momentum = 0.5
    config.outer.nesterov = True
    config.outer.overlap = False  # the exchange is of what the inner steps began with, and can hide behind them
    config.outer.stream = False  # one of `every` segments takes its outer step at each step
    config.outer.wire = placeholder(str)
    config.outer.rounds = 1
    config.outer.seed = 0

    # Of others, to be compared with (`experiments/others.py`).
    config.noloco = ml_collections.ConfigDict()
    config.noloco.every = 16  # inner steps
    config.noloco.learning_rate = 0.7
    config.noloco.momentum = 0.5
    config.noloco.pool_size = 16  # drawings of pairs
    config.noloco.seed = 0

    config.des_loc = ml_collections.ConfigDict()
    config.des_loc.every = 1  # steps between two exchanges of the parameters
    config.des_loc.first_every = 3  # exchanges between two of Adam's first moment
    config.des_loc.second_every = 6  # and of its second
    config.des_loc.rounds = 1
    config.des_loc.wire = placeholder(str)
    config.des_loc.seed = 0
