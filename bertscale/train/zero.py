"""DeepSpeed: the only file that imports it, and that knows the names inside it.

ZeRO (Rajbhandari et al., 2020) shards the optimizer states (stage 1), gradients (2) and weights (3) over the
ranks of a data-parallel group. Tensor-parallel shares are made before, by `parallel`; the mpu tells DeepSpeed
of them. It has no interface to its fragments that fits checkpoints of any topology, so this file reads from
its attributes where they lie, and `Zero.check` refuses a version in which these mean something else.

Tensor: here a float32 tensor that the optimizer updates, flat under ZeRO, of one parameter group. Share: what
a tensor-parallel rank holds of a parameter. Fragment: what this rank holds of the share.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# It calls torch by names that torch renames; one line for each call would drown the log.
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\.")
# Its shared-memory all-reduce for CPUs needs a compiler and a minute at the first start; gloo does without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Stages 1 to 3 import its Muon, which nobody calls here: ours is another. Decorated to be compiled, it would
# load torch's compiler at each start of a rank, two seconds of a core.
with mock.patch.object(deepspeed.runtime.compiler, "compile", return_value=lambda function: function):
    importlib.import_module("deepspeed.runtime.zero.muon.original_muon")

from bertscale.config import FinetuneConfig, PretrainConfig, UserError  # noqa: E402
from bertscale.optim.optimizers import Lamb, Muon, StableAdamW, gradient_of  # noqa: E402
from bertscale.train.parallel import ModelParallelUnit, Ranks, tensor_parallel_dimension  # noqa: E402

# It warns of optimizers that it does not know; ours are tested under each of its stages.
deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS += [StableAdamW, Lamb, Muon]

BUCKET = 40_000_000  # gradients of one all-reduce: megatron-core's minimum; DeepSpeed's is a whole BERT


class Address(NamedTuple):
    """Where this rank's fragment of a parameter lies: `length` values from `offset` on of a flat float32
    tensor, which are those from `start` on of the tensor rank's flattened share."""

    tensor: Tensor
    offset: int
    start: int
    length: int


class Zero:
    """A model and its optimizer, wrapped by DeepSpeed. `clips`: whether DeepSpeed clips the gradients.

    `tensors`: those that the optimizer updates, with the names of their parameters; `addresses`: where this
    rank's fragments lie in them. Raises UserError where DeepSpeed's attributes are not what this file knows.
    """

    def __init__(
        self,
        config: PretrainConfig | FinetuneConfig,
        ranks: Ranks,
        dtype: torch.dtype,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    ) -> None:
        self.ranks, self.stage = ranks, config.parallel.zero_stage
        # On those two paths DeepSpeed gives no access to the gradients between reducing and using them.
        self.clips = self.stage == 3 or (self.stage == 0 and dtype == torch.bfloat16)
        settings = self._settings(config, dtype)
        mpu = ModelParallelUnit(ranks)
        if deepspeed.comm.comm.cdb is None:
            deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), verbose=False)
        with deepspeed.zero.Init(
            config_dict_or_path=settings,
            mpu=mpu,
            data_parallel_group=ranks.data_group,  # without it shards go over all ranks: silently wrong
            enabled=self.stage == 3,
        ):
            model = make_model()
        for name, parameter in model.named_parameters():
            # Without the mark the gradient norm has the share of one rank alone: silently wrong.
            parameter.tensor_model_parallel = tensor_parallel_dimension(name) is not None  # type: ignore[attr-defined]
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=make_optimizer(model), config=settings, mpu=mpu, dist_init_required=False
        )
        if (
            self.stage == 0 and ranks.data == 1
        ):  # else it copies all gradients together to send them to nobody
            self.engine.enable_backward_allreduce = False
        self.wrapper: Any = self.engine.optimizer  # DeepSpeed's, around torch's
        self.optimizer: torch.optim.Optimizer = getattr(self.wrapper, "optimizer", self.wrapper)
        self.optimizer.state.clear()  # without ZeRO, under bfloat16, set-up has made a step on zero gradients
        # Those that are trained; others are in no group of the optimizer and never change.
        named: dict[str, Any] = dict(model.named_parameters())
        self.parameters = {name: value for name, value in named.items() if value.requires_grad}
        self.names = {id(parameter): name for name, parameter in self.parameters.items()}
        try:
            self.tensors = self._tensors()
            self.addresses = self._addresses()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise unknown_layout(f"{type(error).__name__}: {error}") from error
        self.check()

    def _settings(self, config: PretrainConfig | FinetuneConfig, dtype: torch.dtype) -> dict[str, Any]:
        """DeepSpeed's configuration. Where it clips, the host waits for the device in each step."""
        train, ranks = config.train, self.ranks
        micro = train.micro_samples or 1
        # `backward` is told when a step ends, whatever number of micro-batches is named here.
        per_rank = max(1, train.global_batch // (micro * ranks.data))
        return {
            "train_batch_size": per_rank * micro * ranks.data,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": per_rank,
            "gradient_clipping": config.optimizer.gradient_clipping if self.clips else 0.0,
            "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": self.clips},
            "zero_optimization": {
                "stage": self.stage,
                "compute_grad_norm": self.clips or self.stage == 0,
                # The backward pass continues while gradients travel, one bucket at a time.
                "overlap_comm": self.stage > 0 and ranks.data > 1,
                "reduce_bucket_size": BUCKET,
            },
            "steps_per_print": 2**62,
        }

    # ------------------------------------------------------------------------------------- training

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Adds the gradients of `loss`; `last`: of the micro-batches of this global step."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def at_end_of_step(self) -> bool:
        """Whether the last call of `backward` was that of the last micro-batch of a global step."""
        return bool(self.engine.is_gradient_accumulation_boundary())

    def step(self, learning_rate: float) -> None:
        """Ends a micro-batch; at the end of the global step: all-reduce, clip where it `clips`, update."""
        for group in self.wrapper.param_groups:
            group["lr"] = learning_rate * group.get("scale", 1.0)
        self.engine.step()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's fragments of the gradient of the step that ends, with the names of their parameters."""
        if self.stage == 0:
            yield from ((name, gradient_of(parameter)) for name, parameter in self.parameters.items())
            return
        for group, gradients in self.wrapper.averaged_gradients.items():
            # Behind the parameters' gradients there may be one of zeros, which pads the last rank's part.
            for parameter, gradient in zip(self.wrapper.params_in_partition[group], gradients, strict=False):
                name = self.names[id(parameter)]
                if gradient.numel() != self.addresses[name].length:
                    raise unknown_layout(f"the gradient of {name} has {gradient.numel():,} values")
                yield name, gradient

    # ----------------------------------------------------------------------------------- its layout

    def share_shape(self, name: str) -> list[int]:
        """Shape of this tensor rank's share of a parameter."""
        parameter = self.parameters[name]
        return list(parameter.ds_shape if self.stage == 3 else parameter.shape)

    def refresh_weights(self) -> None:
        """Copies the float32 tensors, after they were written into, to the weights that ZeRO-3 computes with.

        Under stages 0 to 2 those are the model's parameters, which `Engine` fills itself.
        """
        if self.stage == 3:
            self.wrapper._partition_all_parameters()
            for group in range(len(self.wrapper.fp32_partitioned_groups_flat)):
                self.wrapper._reassign_or_swap_out_partitioned_parameters(group)

    def _tensors(self) -> list[tuple[Tensor, list[str]]]:
        """The float32 tensors that the optimizer updates, each with its parameters on whichever data rank.

        ZeRO flattens groups of parameters and keeps a part of each group on a rank; without it parameters
        stay as they are, under bfloat16 beside float32 copies.
        """
        wrapper = self.wrapper
        groups: Iterable[tuple[Tensor, Iterable[Tensor]]]
        if self.stage == 3:
            groups = zip(wrapper.fp32_partitioned_groups_flat, wrapper.fp16_groups, strict=True)
        elif self.stage > 0:
            groups = zip(wrapper.single_partition_of_fp32_groups, wrapper.bit16_groups, strict=True)
        elif hasattr(wrapper, "fp32_groups"):
            pairs = zip(wrapper.fp32_groups, wrapper.fp16_groups, strict=True)
            groups = ((copy, [p]) for pair in pairs for copy, p in zip(*pair, strict=True))
        else:
            groups = ((p, [p]) for p in self.parameters.values())
        return [(tensor, [self.names[id(parameter)] for parameter in group]) for tensor, group in groups]

    def _addresses(self) -> dict[str, Address]:
        """Where this rank's fragment of each parameter lies, if it has one."""
        addresses = {}
        for tensor, names in self.tensors:
            for name in names:
                parameter = self.parameters[name]
                if self.stage == 3:  # each is cut into equal parts over the data ranks, the last one padded
                    _, offset, size = self.wrapper.grad_position[self.wrapper.get_param_id(parameter)]
                    start = size * self.ranks.data_rank
                    address = Address(tensor, offset, start, max(0, min(size, parameter.ds_numel - start)))
                elif self.stage == 0:
                    address = Address(tensor, 0, 0, tensor.numel())
                elif parameter._hp_mapping is None:  # another data rank's
                    continue
                else:  # the groups are cut into equal parts over the data ranks
                    # hp: high precision, float32; lp: low precision, which the model computes in.
                    inside = parameter._hp_mapping.hp_fragment_address
                    start = parameter._hp_mapping.lp_fragment_address.start
                    address = Address(tensor, inside.start, start, inside.numel)
                if address.length:
                    addresses[name] = address
        return addresses

    def check(self) -> None:
        """Raises UserError, on all ranks alike, where the fragments cannot be what `_addresses` says.

        Every parameter must be in one tensor, every fragment inside of its tensor, and the fragments of all
        ranks together must have as many values as the parameter. One collective.
        """
        names = sorted(name for _, inside in self.tensors for name in inside)
        others = names != sorted(self.parameters)  # a name is missing, or there twice
        outside = sum(a.offset < 0 or a.offset + a.length > a.tensor.numel() for a in self.addresses.values())
        lengths = [self.addresses[name].length if name in self.addresses else 0 for name in self.parameters]
        *totals, all_others, all_outside = self.ranks.sum(*lengths, others, outside)
        if all_others:
            raise unknown_layout("its tensors hold other parameters than the model")
        if all_outside:
            raise unknown_layout(f"{all_outside:.0f} fragments lie outside of their tensors")
        holders = self.ranks.tensor if self.stage else self.ranks.world  # of each value of a share
        for name, total in zip(self.parameters, totals, strict=True):
            numel = torch.Size(self.share_shape(name)).numel()
            if total != holders * numel:
                raise unknown_layout(f"{name} has {total / holders:,.0f} values instead of {numel:,}")


def unknown_layout(what: str) -> UserError:
    """The error to raise where DeepSpeed is not as this file knows it."""
    return UserError(
        f"DeepSpeed {deepspeed.__version__} lays out its tensors in a way that bertscale does not know "
        f"({what}); install a version that pyproject.toml names"
    )
