"""The training loop: one discriminator update, one generator update, and what is written down in between.

    trainer = Trainer(loader, config)
    trainer.train()

Everything random in a step comes from one generator seeded by (seed, step), and the batch is a function of the
position in the data: a run that was stopped and continued takes the same steps as one that was not.
"""

import dataclasses
import math
import signal
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor, nn

from data_loader import Loader
from errors import UserError, warn
from metrics.evaluation import check_metrics, measure
from networks.latents import sample_z
from networks.losses import D_LOSSES, g_loss, gradient_penalty
from parameter import Config
from sagan_models import Discriminator, Generator, gammas_and_sigmas
from training import checkpoint
from training.cuda_graph import GraphedStep, can_capture
from training.distributed import Ranks, SyncSchedule
from training.divergence import MANY, NonFiniteError, NonFiniteGuard
from training.log import read_curves
from training.recorder import Recorder
from training.resuming import advice, changed_options, load_resume_checkpoint
from training.run_folders import check_folders, lock_folders, prepare
from utils import (
    EMA,
    SEED_FIXED_Z,
    SEED_METRICS,
    SEED_STEP,
    StopSignals,
    derive_seed,
    eval_mode,
    make_deterministic,
    no_param_grads,
    resolve_device,
    resolve_precision,
    set_learning_rate,
)
from visuals.attention_stats import collect_attention
from visuals.figures import sample_grid


class Trainer:
    """Trains `G` and `D` on a loader's batches as `config` says, together with the other processes of `ranks`.

    Raises:
        UserError: the device or the checkpoint asked for is not there, or does not fit.
    """

    def __init__(self, loader: Loader, config: Config, ranks: Ranks = Ranks()):  # noqa: B008  it cannot change
        self.loader, self.config, self.ranks = loader, config, ranks
        with ranks.raise_together():
            self.device = resolve_device(config.device, ranks.local_rank if ranks.size > 1 else None)
            self.precision = resolve_precision(config.precision, self.device)
            self.part = ranks.shard(config.batch_size)  # this process's images of a batch
            records = can_capture(self.device, config.cuda_graph, config.adv_loss, ranks.size)
        self.step = 0  # finished generator updates

        if config.deterministic:
            make_deterministic()

        # Networks
        self.G = ranks.convert_sync_batchnorm(Generator(config.imsize, config.z_dim, config.g_conv_dim), self.device)
        self.D = Discriminator(config.imsize, config.d_conv_dim)
        for network in (self.G, self.D):
            network.to(self.device, memory_format=torch.channels_last)
        self.ema = EMA(self.G, config.ema_decay)
        self.run_G, self.run_D = ranks.wrap_ddp(self.G), ranks.wrap_ddp(self.D)  # .G and .D are what is saved

        # Optimizers and loss
        # Shapes never change: cuDNN may look for its fastest algorithms, but may find another one next time.
        torch.backends.cudnn.benchmark = self.device.type == "cuda" and not config.deterministic
        self.g_optimizer = self._optimizer(self.G, config.g_lr, records)
        self.d_optimizer = self._optimizer(self.D, config.d_lr, records)
        self.d_loss = D_LOSSES[config.adv_loss]

        # Noise
        self.random = torch.Generator(self.device)
        z_seed = derive_seed(config.seed, SEED_FIXED_Z)
        self.fixed_z = sample_z(z_seed, config.batch_size, config.z_dim, self.device)

        self.run_updates = self._updates
        if records:
            self.run_updates = GraphedStep(self._updates, self.device, allow_fallback=config.cuda_graph == "auto")
        self.watch = NonFiniteGuard()
        if saved := ranks.on_rank_zero(load_resume_checkpoint, config):
            with ranks.raise_together():
                self._resume(saved)

    def d_step(self, real: Tensor, z: Tensor) -> dict[str, Tensor]:
        """One update of the discriminator.

        Args:
            real: images (B, 3, S, S) in [-1, 1].
            z: noise (B, z_dim).

        Returns:
            d_loss_real, d_loss_fake, d_loss (with the penalty of wgan-gp, which is also there alone as d_penalty), and
            the mean logits d_real, d_fake: detached 0-d tensors on the device.
        """
        with self._autocast():
            with torch.no_grad():
                fake = self.run_G(z).float()
            real_logits, fake_logits = (logits.float() for logits in self.run_D(real, fake))
        loss_real, loss_fake = self.d_loss(real_logits, fake_logits)
        stats = {
            "d_loss_real": loss_real,
            "d_loss_fake": loss_fake,
            "d_loss": loss_real + loss_fake,
            "d_real": real_logits.mean(),
            "d_fake": fake_logits.mean(),
        }
        if self.config.adv_loss == "wgan-gp":
            stats["d_penalty"] = gradient_penalty(self._critic_with_double_backward, real, fake, self._mix())
            stats["d_loss"] = stats["d_loss"] + self.config.lambda_gp * stats["d_penalty"]
        self.d_optimizer.zero_grad()
        stats["d_loss"].backward()
        self.d_optimizer.step()
        return {name: value.detach() for name, value in stats.items()}

    def g_step(self, z: Tensor) -> dict[str, Tensor]:
        """One update of the generator on noise z (B, z_dim). Returns g_loss, detached and 0-d."""
        with no_param_grads(self.D):  # its own gradients would be thrown away
            with self._autocast():
                loss = g_loss(self.D(self.run_G(z)).float())
            self.g_optimizer.zero_grad()
            loss.backward()
        self.g_optimizer.step()
        return {"g_loss": loss.detach()}

    def train(self) -> int:
        """Trains until `total_step`, or until SIGINT or SIGTERM; returns 0, or 128 + the signal's number.

        Raises:
            UserError: a result folder cannot be written or is in use, the data cannot be read, or the run diverged.
        """
        config, ranks = self.config, self.ranks
        ranks.on_rank_zero(self._check)
        # Opens the data: what is wrong with it is said before a folder is made.
        ranks.rank_zero_first(lambda: self.loader.skipped)
        agreed = ranks.all_equal(self.loader.checksum)
        with ranks.raise_together():
            if not agreed:
                raise UserError(
                    "the machines of this run hold different images, or decode them differently: copy the images, or "
                    "the folder of --cache_path, from one to all"
                )
        with ExitStack() as claims:
            ranks.on_rank_zero(self._open, claims)
            try:
                received = self._loop()
            except NonFiniteError as error:
                raise UserError(advice(config, error)) from error
        if received:
            name = signal.Signals(received).name
            print(f"stopped by {name} after step {self.step}, which is saved; continue with")
            print(" ", config.command(pretrained_model=str(self.step)))
            return 128 + received
        print(f"{self.step} steps done; what they left:")
        for name, folder in config.folders.items():
            print(f"  {name:<12}{folder}")
        return 0

    def _check(self) -> None:
        """Makes sure, before any work, that the run may write its results and can compute its metrics."""
        check_folders(self.config, self.step)
        check_metrics(self.config, self.device)

    def _open(self, claims: ExitStack) -> None:
        """Claims the folders until `claims` ends, clears them, and begins the run's results."""
        config = self.config
        claims.enter_context(lock_folders(config))
        prepare(config, self.step, self.loader.skipped)
        print(config.summary())
        shared = f" in each of {self.ranks.size} processes" if self.ranks.size > 1 else ""
        print(
            f"training {config.model} at {config.imsize}x{config.imsize} on {self.device} in {self.precision}{shared}, "
            f"{len(self.loader)} batches of {config.batch_size} images an epoch"
        )
        self.real = self.loader.batch(0)  # what D's attention is shown on
        real_path = config.sample_folder / "real.png"
        if self.step == 0 or not real_path.exists():
            sample_grid(self.real).save(real_path)

    def _begin_recording(self, stack: ExitStack) -> None:
        self.recorder = stack.enter_context(Recorder(self.config, self.step, self.device, self.precision))

    def _loop(self) -> int:
        """Takes steps until `total_step`, and returns 0, or until a signal to any process, and returns its number."""
        config, ranks, received = self.config, self.ranks, 0
        with StopSignals() as stop, ExitStack() as stack:
            ranks.on_rank_zero(self._begin_recording, stack)
            self.saved_step, self.saved_at = self.step, time.monotonic()
            self.save_step = max(1, round(config.model_save_step * len(self.loader) / config.n_critic))
            past = read_curves(config.log_folder, self.step) if config.metrics else {}
            self.best_fid = past["fid"][:, 1].min() if "fid" in past else math.inf
            meetings = SyncSchedule(ranks, self.step)
            while self.step < config.total_step and not received:
                stats = self._take_step()
                self.step += 1
                if self._is_logged():
                    stats = ranks.mean(stats)
                if ranks.is_rank_zero:
                    self.watch.note(self.step, stats["d_loss"], stats["g_loss"])
                if meetings.is_due(self.step) or self._is_any_due():
                    with ranks.raise_together():
                        if ranks.is_rank_zero:
                            self.maintain(stats)
                    received = ranks.max(stop.received or 0)
                    meetings.synced(self.step)
            if received:
                ranks.on_rank_zero(self._save_last)
        return received

    def maintain(self, stats: dict[str, Tensor]) -> None:
        """What is due after a step: a line of the log, samples, attention figures, a checkpoint; all after the last."""
        config = self.config
        self.recorder.advance(self.step)
        self.watch.check_losses(at_least=MANY)
        minutes = (time.monotonic() - self.saved_at) / 60
        metrics = self._evaluate() if self._is_measured() else {}
        if self._is_logged():
            self._log(stats, metrics)
        if self._is_due(config.sample_step):
            self._sample()
        if self._is_due(config.attn_step):
            self._show_attention()
        if self._is_due(self.save_step) or 0 < config.save_minutes <= minutes:
            self._save(self.step)
            self.saved_step, self.saved_at = self.step, time.monotonic()

    def _is_due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last, is due after this step."""
        return self.step == self.config.total_step or self.step % every == 0

    def _is_any_due(self) -> bool:
        """Whether anything is due after this step but for the clock."""
        every = (self.config.log_step, self.config.sample_step, self.config.attn_step, self.save_step)
        return self._is_measured() or any(map(self._is_due, every))

    def _is_measured(self) -> bool:
        """Whether metrics are due after this step."""
        return bool(self.config.metrics) and self._is_due(self.config.metric_step)

    def _is_logged(self) -> bool:
        """Whether a line of the log is due after this step."""
        return self._is_measured() or self._is_due(self.config.log_step)

    def _save_last(self) -> None:
        """Saves what is not saved yet, before an early end."""
        if self.saved_step != self.step:
            self._save(self.step)

    def _take_step(self) -> dict[str, Tensor]:
        """One step: draws its inputs, sets its learning rates, runs its updates. Returns the last updates' stats."""
        config = self.config
        self.random.manual_seed(derive_seed(config.seed, SEED_STEP, self.step))
        factor = self._learning_rate_factor(self.step)
        for optimizer, rate in ((self.g_optimizer, config.g_lr), (self.d_optimizer, config.d_lr)):
            set_learning_rate(optimizer, rate * factor)
        first = self.step * config.n_critic
        reals = [self.loader.batch(position, self.part) for position in range(first, first + config.n_critic)]
        noises = [self._noise() for _ in range(config.n_critic + 1)]
        stats = self.run_updates(reals, noises)
        self.ema.update(self.step)
        return stats

    def _updates(self, reals: Sequence[Tensor], noises: Sequence[Tensor]) -> dict[str, Tensor]:
        """The updates of one step: D's on each real batch with a noise, then G's on the last noise."""
        for real, z in zip(reals, noises, strict=False):
            stats = self.d_step(real, z)
        return stats | self.g_step(noises[-1])

    def _optimizer(self, network: nn.Module, rate: float, recorded: bool) -> torch.optim.Adam:
        if self.device.type == "cuda":
            rate = torch.tensor(rate, device=self.device)  # which a recorded step reads anew
        betas = (self.config.beta1, self.config.beta2)
        return torch.optim.Adam(network.parameters(), rate, betas, fused=True, capturable=recorded)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _noise(self) -> Tensor:
        """This process's part of a batch of z, all of which every process draws."""
        shape = (self.config.batch_size, self.config.z_dim)
        return torch.randn(shape, device=self.device, generator=self.random)[self.part]

    def _mix(self) -> Tensor:
        """The same of the shares of the real image in wgan-gp's mixtures."""
        shape = (self.config.batch_size, 1, 1, 1)
        return torch.rand(shape, device=self.device, generator=self.random)[self.part]

    def _critic_with_double_backward(self, images: Tensor) -> Tensor:
        """D by the path that computes the attention maps: the fused one has no double backward."""
        return self.D(images, return_attention=True)[0]

    def _learning_rate_factor(self, step: int) -> float:
        """What the learning rates are multiplied by in the step after `step` finished ones."""
        match self.config.lr_schedule:
            case "exponential":
                return self.config.lr_decay ** (step * self.config.n_critic // len(self.loader))
            case "linear":
                return 1 - step / self.config.total_step
        return 1.0

    def _resume(self, saved: checkpoint.Checkpoint) -> None:
        """Takes over a checkpoint: weights, and with its state file all that the next step depends on."""
        config = self.config
        self.step = saved.step
        with checkpoint.complete(saved.step):
            self.G.load_state_dict(saved.G)
            self.D.load_state_dict(saved.D)
            self.ema.network.load_state_dict(saved.state["ema"] if saved.state else saved.G)
        if saved.state is None:
            warn(f"checkpoint {saved.step} has no state file: the optimizers and the averaged generator start anew")
            return
        with checkpoint.complete(saved.step):
            self.fixed_z = saved.state["fixed_z"].to(self.device)
            for name, optimizer in (("g_optimizer", self.g_optimizer), ("d_optimizer", self.d_optimizer)):
                # Rates and betas are this run's options, not the saved ones.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": saved.state[name]["state"], "param_groups": groups})
            changes = changed_options(saved.state["config"], config)
        print(f"continuing after step {self.step}" + (f", with other options: {', '.join(changes)}" if changes else ""))

    def _log(self, stats: dict[str, Tensor], metrics: dict[str, float]) -> None:
        """Records losses, gamma of each attention layer, sigma of each spectral norm, learning rates, and metrics."""
        values = stats | gammas_and_sigmas("G", self.G) | gammas_and_sigmas("D", self.D)
        self.watch.check_losses()  # waits for the device: what it has to do was handed in before
        factor = self._learning_rate_factor(self.step - 1)
        rates = {"lr/g": self.config.g_lr * factor, "lr/d": self.config.d_lr * factor}
        self.recorder.log(self.step, values, rates | metrics)

    def _sample(self) -> None:
        """Records what G and its average make of the fixed z."""
        self.watch.check_losses()
        with eval_mode(self.G, self.ema.network):
            self.recorder.samples(self.step, "fake", self.G(self.fixed_z))
            self.recorder.samples(self.step, "ema", self.ema.network(self.fixed_z))

    def _show_attention(self) -> None:
        """Records every attention layer: of the averaged G on the fixed z, of D on its images and on real ones."""
        with eval_mode(self.ema.network, self.D):
            count = self.config.g_num
            shown = collect_attention(self.ema.network, self.D, self.fixed_z[:count], self.real[:count])
        self.recorder.attention(self.step, shown)
        if self.step == self.config.total_step:
            self.recorder.explorer(self.step, shown)

    def _evaluate(self) -> dict[str, float]:
        """Metrics of the averaged G, or of G itself under --use_ema false; keeps the checkpoint with the lowest FID."""
        network = self.ema.network if self.config.use_ema else self.G
        seed = derive_seed(self.config.seed, SEED_METRICS)
        z = sample_z(seed, self.config.metric_num, self.config.z_dim, self.device)
        try:
            with eval_mode(network):
                metrics = measure(self.config, network, z, self.loader)
        except UserError as error:  # a full disk, say: no reason to stop training
            warn(f"no metrics of step {self.step}: {error}")
            return {}
        if metrics.get("fid", math.inf) < self.best_fid:
            self.best_fid = metrics["fid"]
            self._save("best")
        return metrics

    def _save(self, name: int | Literal["best"]) -> None:
        """Records a checkpoint, unless something in it is not finite.

        The random state is not in it: it is a function of the seed and the step.
        """
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "fixed_z": self.fixed_z,
            "ema": self.ema.network.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
        }
        G, D = self.G.state_dict(), self.D.state_dict()
        self.watch.check(self.step, G, D, state)
        self.recorder.checkpoint(name, G, D, state)
