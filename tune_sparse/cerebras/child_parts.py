"""What the child puts into Model Zoo's Trainer: what is trained, its learning rates, its checkpoints.

Of the site's environment, as the child is, and imported by it as a file beside it.
"""

import functools
import math

import cerebras.pytorch as cstorch
import torch
import torch.nn.functional as F
from cerebras.modelzoo.common.utils.model.lora import LoRA_Linear
from cerebras.modelzoo.trainer.callbacks import Callback, Lora
from cerebras.pytorch.backend import current_backend_impl


class MaskedLoRALinear(LoRA_Linear):
    """y = (W + s(BA)⊙(W != 0)) x + b: the update reaches only weights that are not 0."""

    def forward(self, x):
        update = (self.lora_B @ self.lora_A) * self.scaling
        return F.linear(x, self.weight + update * (self.weight != 0).to(update.dtype), self.bias)


class Adapters(Lora):
    """LoRA layers in the decoder's linear layers, masked ones where the job says so."""

    def __init__(self, job):
        settings = {"r": job["rank"], "alpha": job["alpha"], "dropout": job["dropout"], "merge_weights": False}
        super().__init__({**settings, "target_modules": ["TransformerDecoderLayer", "Linear"]})
        self.is_masked = job["update_is_masked"]

    def pre_setup(self, trainer):
        super().pre_setup(trainer)
        make = trainer.callbacks["model"].model

        @functools.wraps(make)
        def masked():
            model = make()
            for module in model.modules():
                if type(module) is LoRA_Linear:
                    module.__class__ = MaskedLoRALinear
            return model

        if self.is_masked:
            trainer.callbacks["model"].model = masked


class Weights(Callback):
    """The pruned matrices themselves are trained, and nothing else."""

    def __init__(self, names):
        self.names = {"model." + name for name in names}

    def pre_setup(self, trainer):
        make = trainer.callbacks["model"].model

        @functools.wraps(make)
        def frozen():
            model = make()
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in self.names)
            return model

        trainer.callbacks["model"].model = frozen

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


class OnlyTrained(Callback):
    """Checkpoints without frozen weights, which are there from the start: a wafer takes minutes to give them back.

    Masks are there too, unless they change.
    """

    def __init__(self, job):
        self.masks = {"model." + name + "_mask" for name in job["pruned"]} if job["changes"] else set()

    def postprocess_checkpoint(self, trainer, state_dict):
        trained = self.masks | {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
        state_dict["model"] = {name: tensor for name, tensor in state_dict["model"].items() if name in trained}

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


class Schedule(cstorch.optim.lr_scheduler.LRScheduler):
    """Linear warm-up, step i of w at (i + 1) / w of the peak, then a cosine that ends with the last step.

    Its numbers are state, as the step is, and no constants: other rates and more steps are the same graph.
    """

    def __init__(self, job, optimizer):
        self.job = job
        super().__init__(optimizer, total_iters=None)

    def _post_init(self):
        job = self.__dict__.pop("job")
        peak, final, warmup = job["learning_rate"], job["final_learning_rate"], job["warmup_steps"]
        fall = max(1, job["steps"] - 1 - warmup)
        numbers = {"warmup": warmup, "rise": peak / max(1, warmup), "final": final, "drop": peak - final, "fall": fall}
        with current_backend_impl().device:
            for name, number in {**numbers, "turn": math.pi / fall}.items():
                setattr(self, name, torch.tensor(number, dtype=torch.float32).to(self.device))
        super()._post_init()

    def _get_closed_form(self):
        step = self.last_epoch.to(torch.float32)
        fallen = torch.minimum(step - self.warmup, self.fall)
        cosine = self.final + self.drop * (fallen * self.turn).cos().add(1).mul(0.5)
        return torch.where(step < self.warmup, (step + 1) * self.rise, cosine)
