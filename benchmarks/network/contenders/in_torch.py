"""The tasks' models in PyTorch, with the contenders that come from packages of it: `pip install -e '.[peers]'`.

    local               no exchange
    ddp                 torch's DistributedDataParallel; its defaults, buckets of 25 MB behind a first one of 1 MB
    decent/TOPOLOGY     Decent-DP's, "complete" (its default) or "one-peer-exp"; buckets of 25 MB
    post_local/H/W      torch's PostLocalSGDOptimizer: W steps of DDP, then an average after each H steps
    diloco/H            DiLoCo after each H steps by one all-reduce of what has changed, η 0.7 and μ 0.9, as the paper's

All run on Gloo. torchft's DiLoCo needs a lighthouse and a manager beside each host, so DiLoCo is written here.
"""

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from benchmarks.network.contenders import tasks
from benchmarks.network.contenders.tasks import Task


class Wait(torch.autograd.Function):
    """Seconds that stand for a part of the backward pass, so that what hides behind one can."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return grad, None


class Model(nn.Module):
    """A task's model; its parameters have the names of `tasks.shapes`."""

    def __init__(self, task: Task, seed: int):
        super().__init__()
        self.task, self.seconds = task, 0.0
        for name, value in tasks.first_values(task, seed).items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(value)))

    def own(self, layer: int) -> dict[str, Tensor]:
        return {k.split("/")[1]: v for k, v in self.named_parameters() if k.startswith(f"layer{layer}/")}

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.task.sizes
        layers = sizes.get("layers", 2)
        time.sleep(self.seconds / 3)  # the forward pass; the backward pass is twice as long

        def waited(x: Tensor) -> Tensor:
            return Wait.apply(x, self.seconds * 2 / 3 / layers)

        of_layer = [self.own(i) for i in range(layers)]
        if "hidden" in sizes:
            first, last = of_layer
            x = waited(torch.relu(x @ first["kernel"] + first["bias"]))
            return waited(x @ last["kernel"] + last["bias"])
        params = dict(self.named_parameters())
        x = params["embedding"][x.long()]
        for own in of_layer:
            x = x + attention(normal(x, own["before_attention"]), own, sizes["heads"])
            y = normal(x, own["before_mlp"])
            x = waited(x + (silu(y @ own["gate"]) * (y @ own["up"])) @ own["down"])
        return normal(x, params["norm"]) @ params["head"]


def normal(x: Tensor, scale: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * scale


def attention(x: Tensor, own: dict[str, Tensor], heads: int) -> Tensor:
    batch, length, width = x.shape
    q, k, v = ((x @ own[name]).view(batch, length, heads, -1).transpose(1, 2) for name in ("query", "key", "value"))
    y = nn.functional.scaled_dot_product_attention(turned(q), turned(k), v, is_causal=True)
    return y.transpose(1, 2).reshape(batch, length, width) @ own["out"]


def turned(x: Tensor) -> Tensor:
    """Rotary positions, of the halves of each head's features."""
    *_, length, size = x.shape
    angle = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(0, size, 2) / size))
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


class Contender:
    """The training of one host by a package's own wrapper."""

    def __init__(self, text: str, task: Task):
        self.task, (self.name, *self.options) = task, text.split("/")

    def begin(self, seed: int, highest: float) -> None:
        """The first state of a run."""
        self.inside = Model(self.task, seed)
        self.highest, self.wrapped = highest, self.inside
        getattr(self, f"begin_{self.name}")()

    def optimizer_of(self, params: Any) -> torch.optim.Optimizer:
        if self.task.optimizer == "sgd":
            return torch.optim.SGD(params, self.highest, momentum=0.9)
        return torch.optim.AdamW(params, self.highest, betas=(0.9, 0.99), weight_decay=0.1)

    def schedule_of(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: tasks.rate_at(t, self.task, 1.0))

    def begin_local(self) -> None:
        self.optimizer = self.optimizer_of(self.inside.parameters())
        self.schedule = self.schedule_of(self.optimizer)

    def begin_ddp(self) -> None:
        self.wrapped = nn.parallel.DistributedDataParallel(self.inside)
        self.begin_local()

    def begin_post_local(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook as hook
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
        from torch.distributed.optim import PostLocalSGDOptimizer

        self.begin_ddp()
        every, warmup = map(int, self.options)
        # A host has one process: there is no group inside it to average gradients in.
        state = hook.PostLocalSGDState(None, None, warmup, post_local_gradient_allreduce=False)
        self.wrapped.register_comm_hook(state, hook.post_localSGD_hook)
        self.optimizer = PostLocalSGDOptimizer(self.optimizer, PeriodicModelAverager(every, warmup))

    def begin_decent(self) -> None:
        from decent_dp.ddp import DecentralizedDataParallel
        from loguru import logger

        logger.remove()
        self.wrapped = DecentralizedDataParallel(
            self.inside,
            optim_fn=lambda named: self.optimizer_of([param for _, param in named]),
            lr_scheduler_fn=self.schedule_of,
            topology=self.options[0],
        )
        self.optimizer = self.schedule = None

    def begin_diloco(self) -> None:
        self.begin_local()
        self.slow = nn.utils.parameters_to_vector(self.inside.parameters()).detach().clone()
        self.outer = torch.optim.SGD([self.slow], 0.7, momentum=0.9, nesterov=True)

    @torch.no_grad()
    def outer_step(self) -> None:
        change = self.slow - nn.utils.parameters_to_vector(self.inside.parameters())
        dist.all_reduce(change)
        self.slow.grad = change / dist.get_world_size()
        self.outer.step()
        nn.utils.vector_to_parameters(self.slow.clone(), self.inside.parameters())

    def step(self, t: int, batch: tasks.Examples, wait: float = 0.0) -> None:
        self.inside.seconds = wait
        inputs, labels = (torch.from_numpy(np.array(x[0])) for x in batch)
        output = self.wrapped(inputs)
        if self.optimizer is None:
            self.wrapped.zero_grad()
        else:
            self.optimizer.zero_grad()
        cross_entropy(output.flatten(0, -2), labels.flatten().long()).backward()
        if self.optimizer is not None:  # Decent-DP steps as the gradients come
            self.optimizer.step()
            self.schedule.step()
        if self.name == "diloco" and (t + 1) % int(self.options[0]) == 0:
            self.outer_step()

    def finish(self) -> None:
        """Wait for what is on its way; Decent-DP waits for it in the next step only, and has no public name for it."""
        for work in getattr(self.wrapped, "_comm_ops", ()):
            if work is not None:
                work.wait()

    def vectors(self) -> np.ndarray:
        named = dict(self.inside.named_parameters())
        return tasks.as_vector({name: param.detach().numpy() for name, param in named.items()}, self.task)[None]
