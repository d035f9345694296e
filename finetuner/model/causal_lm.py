"""A causal language model that learns: a packed row in, the sum of the cross entropy over its learned places out.

tokens_1T -> embedding (NEFTune's noise, in training) -> decoder, documents apart -> hidden_1TD -> learned places only
-> head and loss, a piece at a time (`head.py`).

- Trained parameters are float32; the compute dtype comes by autocast.
- A row without a learned place gives exactly 0, and zero gradients rather than none, so that every rank takes part.
- What cannot keep documents apart is found by trying it, when the learner is made: see `prove`.

Shapes: T tokens of the row, N learned places, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetuner.data.batch import IGNORED, Batch
from finetuner.errors import ModelError, Problem
from finetuner.model import account, attention, save
from finetuner.model.head import loss_sum, whole_loss_sum
from finetuner.model.soundness import first_line


class CausalLearner(nn.Module):
    """`model` is transformers' model, or peft's around it; `stored` the dtype in which a whole model is saved."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerFast,
        *,
        adapted: bool,
        attends: str,
        compute: torch.dtype,
        stored: torch.dtype,
        neftune: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.adapted, self.attends, self.compute, self.stored, self.neftune = adapted, attends, compute, stored, neftune
        try:
            self.causal.set_attn_implementation(attends)
        except (ValueError, ImportError) as error:
            what, remedy = first_line(error), 'model.attention="eager"'
            raise ModelError(Problem("E-ATTENTION-UNFIT", what, "model.attention", attends, remedy=remedy)) from error
        self.has_plain_head = self.prove()
        if not self.trainable():
            raise ModelError(
                Problem(
                    "E-MODEL-FROZEN", "no parameter trains", "model.freeze", remedy="freeze less, or add an adapter"
                )
            )

    @property
    def causal(self) -> PreTrainedModel:
        """transformers' model, with the adapter's layers in it if there is one."""
        causal: PreTrainedModel = self.model.get_base_model() if self.adapted else self.model  # type: ignore[operator]
        return causal

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal.get_input_embeddings().weight.device
        return device

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross entropy over the learned places, a float32 scalar."""
        if batch.learned == 0:
            return self.nothing()
        device = self.device
        targets_T = batch.targets_1T[0].to(device, non_blocking=True).long()
        # Of a size known beforehand: to ask a GPU how many places there are would wait for it.
        places_N = torch.nonzero_static(targets_T != IGNORED, size=batch.learned)[:, 0]
        targets_N = targets_T[places_N]
        with self.autocast():
            given = self.inputs(batch.tokens_1T.to(device, non_blocking=True).long(), batch)
            if not self.has_plain_head:
                logits_1NV = self.causal(**given, logits_to_keep=places_N).logits
                return whole_loss_sum(logits_1NV[0], targets_N)
            hidden_1TD = self.causal.base_model(**given).last_hidden_state
            return loss_sum(self.causal.get_output_embeddings(), hidden_1TD[0, places_N], targets_N, self.compute)

    def inputs(self, tokens_1T: Tensor, batch: Batch) -> dict[str, Any]:
        """What transformers' forward takes. Neither mask nor cache: with one, packed documents would be mixed."""
        positions_1T = batch.positions_1T.to(tokens_1T.device, non_blocking=True).long()
        given = {"position_ids": positions_1T, "use_cache": False, **attention.arguments(self.attends, batch.lengths)}
        if self.neftune is None or not self.training:
            return given | {"input_ids": tokens_1T}
        embedded_1TD = self.causal.get_input_embeddings()(tokens_1T)
        return given | {"inputs_embeds": embedded_1TD + noise(embedded_1TD, batch.lengths, self.neftune)}

    def nothing(self) -> Tensor:
        """0, with a zero gradient for each trained parameter."""
        parts = [parameter.flatten()[:1].float().sum() * 0.0 for _, parameter in self.trainable()]
        return torch.stack(parts).sum()

    @torch.no_grad()
    def prove(self) -> bool:
        """Whether the head is a plain function of the hidden state; tries out, too, that documents are kept apart.

        Raises: ModelError where the words of one document move another one.
        """
        device, causal = self.device, self.causal
        tokens_1T = torch.arange(6, device=device)[None]
        other_1T = torch.where(tokens_1T < 3, tokens_1T + 3, tokens_1T)
        positions_1T = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
        given = {"position_ids": positions_1T, "use_cache": False, **attention.arguments(self.attends, (3, 3))}
        with self.evaluating(), self.autocast():
            one_1TD = causal.base_model(input_ids=tokens_1T, **given).last_hidden_state
            two_1TD = causal.base_model(input_ids=other_1T, **given).last_hidden_state
            logits_1TV = causal.get_output_embeddings()(one_1TD)
            whole_1TV = causal(input_ids=tokens_1T, **given).logits
        if moved(one_1TD[:, 3:], two_1TD[:, 3:], self.compute):
            what = "packed documents would see each other in this model"
            found = f"{type(causal).__name__} with attention {self.attends}"
            remedy = 'try attention="eager" or "sdpa", or another model'
            raise ModelError(Problem("E-ATTENTION-LEAK", what, "model.attention", found, remedy=remedy))
        return bool(torch.equal(logits_1TV, whole_1TV))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.compute, enabled=self.compute != torch.float32)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode in the block; then each module's own mode again, frozen parts included."""
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    @contextmanager
    def answering(self) -> Iterator[PreTrainedModel]:
        """transformers' model ready to generate: evaluation mode, an attention that takes a cache; then as before."""
        causal = self.causal
        own = attention.transformers_own(causal) if self.attends == attention.NAME else self.attends
        causal.set_attn_implementation(own)
        try:
            with self.evaluating(), torch.no_grad(), self.autocast():
                yield causal
        finally:
            causal.set_attn_implementation(self.attends)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters that train, by name; tied ones once."""
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def dtype_table(self) -> tuple[tuple[str, str], ...]:
        """What each part is held and computed in: (("frozen base", "nf4"), ..., ("compute", "bfloat16"))."""
        return account.dtype_table(self.model, self.causal, self.compute)

    def what_trains(self) -> account.Trains:
        """Numbers of parameters: trained, and in all."""
        return account.what_trains(self.model)

    def masters(self) -> dict[str, Tensor]:
        """The float32 values of what trains, by name: what a checkpoint keeps so that resuming loses no bit."""
        return {name: parameter.detach() for name, parameter in self.trainable()}

    @torch.no_grad()
    def load_masters(self, values: Mapping[str, Tensor]) -> None:
        """Takes values that `masters` gave, each by its name.

        Raises: ModelError where names or shapes differ.
        """
        own = self.masters()
        wrong = sorted(own.keys() ^ values.keys())
        wrong += [name for name in own.keys() & values.keys() if own[name].shape != values[name].shape]
        if wrong:
            what, remedy = "the checkpoint's weights are not this model's", "resume with the config that wrote them"
            raise ModelError(Problem("E-MASTERS", what, found=", ".join(wrong[:4]), remedy=remedy))
        for name, parameter in own.items():
            parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Writes a folder that transformers, or peft, loads: weights, tokenizer, template, generation config."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapted:
            save.adapter(self.model, folder)
        else:
            save.whole(self.causal, folder, self.stored)
        save.generation(self.causal, self.tokenizer, folder)
        save.tokenizer(self.tokenizer, folder)
        save.readable(folder)


def moved(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results differ by more than rounding: another document in a kernel's group may cost a last bit."""
    scale = one.float().norm()
    return bool((one.float() - other.float()).norm() > torch.finfo(dtype).eps ** 0.5 * scale)


def noise(embedded_1TD: Tensor, lengths: tuple[int, ...], alpha: float) -> Tensor:
    """NEFTune's uniform noise of a document of L tokens: alpha / sqrt(L D) (arXiv:2310.05914, algorithm 1)."""
    size = embedded_1TD.shape[-1]
    bounds = torch.tensor([alpha / (length * size) ** 0.5 for length in lengths])
    bounds_T = bounds.repeat_interleave(torch.tensor(lengths)).to(embedded_1TD.device, embedded_1TD.dtype)
    return torch.empty_like(embedded_1TD).uniform_(-1, 1) * bounds_T[None, :, None]
