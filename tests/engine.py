"""``unmask`` commands in the processes of one launch: python -m torch.distributed.run … engine.py ENGINE ARGUMENT…

ENGINE is ddp or fsdp2. An ARGUMENT is COMMAND=FILE or, after one, cut=FOLDER, which takes a finished run back to its last
checkpoint but one. accelerate gives FSDP to accelerators only: here, on CPUs, its state says FSDP all the same.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from unmask.cli import main
from unmask.io import launcher
from unmask.models.head import Head
from unmask.training.checkpoints import checkpoints

CONFIGS = Path(__file__).parent.parent / "configs" / "distributed"


def use_fsdp2() -> None:
    """What ``accelerate launch --config_file configs/distributed/fsdp2.yaml`` would do; a head that is a black box fails."""
    settings = load_config_from_file(str(CONFIGS / "fsdp2.yaml")).fsdp_config
    os.environ |= {key.upper(): str(value) for key, value in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    initialize, head_of = AcceleratorState.__init__, Head.of

    def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def gathered(*args: Any, **options: Any) -> Head:
        head = head_of(*args, **options)
        assert head.weight is not None, "the head is a black box: its logits are computed for the whole vocabulary"
        return head

    AcceleratorState.__init__, Head.of = with_fsdp, gathered  # type: ignore[method-assign, assignment]


def use_zero2() -> None:
    """What ``accelerate launch --config_file configs/distributed/zero2.yaml`` would do, but without DeepSpeed's own kernels."""
    import transformers.training_args

    settings = load_config_from_file(str(CONFIGS / "zero2.yaml")).deepspeed_config
    for name, value in settings.items():
        prefix = "ACCELERATE_" if name.startswith("gradient") else "ACCELERATE_DEEPSPEED_"
        os.environ[prefix + name.removesuffix("_flag").upper()] = str(value).lower()
    os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]


def run(command: str, path: str) -> None:
    if command != "cut":
        assert main([command, path]) == 0, (command, path)
        return
    if launcher.rank() == 0:
        shutil.rmtree(checkpoints(Path(path))[-1])
        shutil.rmtree(Path(path) / "final")
    PartialState().wait_for_everyone()


if __name__ == "__main__":
    {"ddp": lambda: None, "fsdp2": use_fsdp2, "zero2": use_zero2}[sys.argv[1]]()
    for argument in sys.argv[2:]:
        run(*argument.split("=", 1))
