"""A look at what a language model writes while it trains."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_moe.data.text import printable
from lightning_moe.errors import ConfigError
from lightning_moe.models.gpt_moe.sampling import Sampling


class TextSamples(Callback):
    """Lets the model continue a prompt every so many optimizer steps, and prints the result.

    Loggers that take texts (their ``experiment`` has ``add_text``, as TensorBoard's has) get it as ``sample``. It works
    with models that have ``generate`` as :class:`~lightning_moe.GPTMoE` has it, and data modules that have a
    ``tokenizer`` as :class:`~lightning_moe.TextDataModule` has it. All ranks generate, as the model may be spread
    over them; rank 0 prints.

    Args:
        every_n_steps: Optimizer steps from one sample to the next.
        prompt: Text to continue, at least one token of it.
        max_new_tokens: Tokens to write.
        temperature: Divides the logits; 0 takes the likeliest token each time.
        top_k: Number of likeliest tokens to draw from; None for all.
        top_p: Probability that the likeliest tokens to draw from add up to; None for all.
        seed: Seed of the draws, the same for each sample.

    Raises:
        ConfigError: A value is out of range; or, when training starts, the model or the data are of no use here.
    """

    def __init__(
        self,
        every_n_steps: int = 500,
        prompt: str = "def ",
        max_new_tokens: int = 128,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> None:
        for field, value in (("every_n_steps", every_n_steps), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ConfigError(field, value, "at least 1")
        if not prompt:
            raise ConfigError("prompt", prompt, "a text that is not empty", "there must be a token to continue")
        Sampling(temperature, top_k, top_p)  # refuses what generate() would refuse at the first sample
        self._every_n_steps = every_n_steps
        self._prompt = prompt
        self._sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "seed": seed,
        }
        self._sampled_step = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sampled_step = trainer.global_step
        needed = (("model", pl_module, "generate"), ("data", getattr(trainer, "datamodule", None), "tokenizer"))
        for field, value, name in needed:
            if not hasattr(value, name):
                cls = type(value).__name__
                raise ConfigError(field, cls, f"one with {name}", "TextSamples needs it to continue a text")
        self._check_length(pl_module, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # While gradients accumulate the step stands still, and one sample of it is enough.
        if step % self._every_n_steps or step == self._sampled_step:
            return
        self._sampled_step = step
        text = self._continue(pl_module, trainer.datamodule.tokenizer)  # type: ignore[attr-defined]
        trainer.print(f"[step {step}] {printable(text)}")
        for logger in trainer.loggers if trainer.is_global_zero else ():
            add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
            if add_text is not None:
                add_text("sample", text, step)

    def _check_length(self, model: Any, tokenizer: Any) -> None:
        """Refuse samples longer than the model is made for now, not after the steps to the first one."""
        longest = getattr(getattr(model, "config", None), "max_sequence_length", None)
        length, new = len(tokenizer.encode(self._prompt)), self._sampling["max_new_tokens"]
        if isinstance(longest, int) and length + new > longest:
            raise ConfigError(
                "max_new_tokens",
                new,
                f"with the {length} tokens of the prompt at most config.max_sequence_length = {longest}",
                "shorten the prompt or the sample",
            )

    def _continue(self, model: Any, tokenizer: Any) -> str:
        """Return the prompt and what follows; a collective call."""
        prompt = torch.tensor([tokenizer.encode(self._prompt)], dtype=torch.int64, device=model.device)
        tokens = model.generate(prompt, **self._sampling)
        text: str = tokenizer.decode(tokens[0].tolist())
        return text
