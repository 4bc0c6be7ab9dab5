"""The sparsity of the pruned matrices in Model Zoo's Trainer: masks that stay, or change by exact counts.

Of the site's environment, as the child is, and imported by it as a file beside it.
"""

import functools

import cerebras.pytorch as cstorch
import torch
from cerebras.modelzoo.trainer.callbacks import Callback
from cerebras.pytorch.sparse.utils import _make_mask_topk_k as largest  # its public callers count in float32


class Silent(cstorch.sparse.Static):
    """Keeps zeros without a word to the compiler."""

    def csx_annotate_sparsity(self, parameter):
        pass


class StaticSparsity(Callback):
    """Static sparsity of the pruned matrices, and of them alone: their zeros are annotated for the compiler, and kept
    where the matrices are trained.

    Model Zoo's own callback would also mask the adapters, or refuse weights that no optimizer has.
    """

    def __init__(self, job):
        self.annotated = job["annotated"]
        self.is_trained = job["trains"] == "weights"
        # In one order, however masks were read: the text of a graph lists its inputs.
        self.names = sorted(job["pruned"] if self.is_trained else self.annotated)

    def setup(self, trainer):
        if not self.names:
            return
        group = cstorch.sparse.Group()
        for name in self.names:
            kind = cstorch.sparse.Static if name in self.annotated else Silent
            algorithm = kind(sparsity=self.annotated.get(name, 0.5), init_method="from_zeros")
            group.add(functools.partial(_is_one_of, {"model." + name}), algorithm)
        trainer.model.apply(group)
        if self.is_trained:
            trainer.optimizer.apply(group)

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


def _is_one_of(wanted, name, parameter):
    return name in wanted


class Counted:
    """Sparsity whose updates keep, of each matrix, as many weights as the job says.

    Nothing but what is kept now survives an update, and what grows begins at 0 with moments of 0, also if it was
    dropped just now. The algorithms alone would let that keep its value.
    """

    def __init__(self, job):
        changes = job["changes"]
        section = {k: v for k, v in changes["section"].items() if k not in ("algorithm", "param_filter")}
        self.steps, self.annotated, self.known = changes["steps"], job["annotated"], {}
        self.counts = {kind: changes[kind] for kind in ("survivors", "kept")}
        super().__init__(**section)

    def csx_annotate_sparsity(self, parameter):
        sparsity = self.annotated.get(parameter.name[len("model.") :])
        if sparsity is not None:
            parameter.annotate("min_sparsity", 0.0 if isinstance(self, cstorch.sparse.GMP) else sparsity)
            parameter.annotate("max_sparsity", sparsity)
            parameter.annotate("sparsity", sparsity)

    def update(self, optimizer=None):
        self.known.clear()
        super().update(optimizer)

    def count(self, kind, parameter):
        """How many weights an update after this step keeps: a tensor, 0 after a step without update."""
        counts = tuple(self.counts[kind][parameter._sparse_param.name[len("model.") :]])
        if counts not in self.known:  # matrices of one size share theirs
            number = torch.tensor(0, dtype=torch.int32, device=self.step.device)
            for update, step in enumerate(self.steps):
                kept = torch.tensor(counts[update], dtype=torch.int32, device=number.device)
                number = torch.where(self.step == step, kept, number)
            self.known[counts] = number
        return self.known[counts]

    def update_mask(self, p, mask, sparsity):
        survivors = self.chosen(torch.where(mask, p.abs(), -1.0), self.count("survivors", p))
        growth = self.growth(p)
        if growth is None:
            return survivors
        survivors = torch.where(self.is_update_step, survivors, mask)
        p._sparse_param.mask = survivors  # which prunes the weight and its moments
        grown = torch.where(survivors, float("-inf"), growth)
        return survivors | self.chosen(grown, self.count("kept", p) - self.count("survivors", p))

    @staticmethod
    def chosen(scores, count):
        """Mark the `count` highest of a matrix."""
        return largest(scores.view(-1), count).view(scores.shape)


class CountedGMP(Counted, cstorch.sparse.GMP):
    """Cuts the smallest."""

    def growth(self, p):
        return None


class CountedSET(Counted, cstorch.sparse.SET):
    """Grows at random."""

    def growth(self, p):
        return torch.rand_like(p)


class CountedRigL(Counted, cstorch.sparse.RigL):
    """Grows by the dense gradients of the step."""

    def growth(self, p):
        return self._dense_grads[p].abs()


ALGORITHMS = {"gmp": CountedGMP, "set": CountedSET, "rigl": CountedRigL}


class ChangingSparsity(Callback):
    """Masks of the pruned matrices that change while these train."""

    def __init__(self, job):
        self.job = job

    def setup(self, trainer):
        self.algorithm = ALGORITHMS[self.job["changes"]["section"]["algorithm"]](self.job)
        group = cstorch.sparse.Group()
        names = {"model." + name for name in self.job["pruned"]}
        group.add(functools.partial(_is_one_of, names), self.algorithm)
        trainer.model.apply(group)
        trainer.optimizer.apply(group)

    def on_save_checkpoint(self, trainer, state_dict):
        state_dict["sparsity"] = self.algorithm.state_dict()

    def on_load_checkpoint(self, trainer, state_dict):
        if "sparsity" in state_dict:
            self.algorithm.load_state_dict(state_dict["sparsity"])

    def on_save_trainer_state(self, trainer, state_dict):
        pass

    def on_load_trainer_state(self, trainer, state_dict):
        pass


def sparsity_of(job):
    """The callback that keeps, or changes, the masks of a job."""
    return ChangingSparsity(job) if job["changes"] and job["pruned"] else StaticSparsity(job)
