"""The training loop: per step `n_critic` updates of the discriminator, one of the generator, and the EMA.

    Trainer(loader, config).train()

All random numbers of a step come from one generator seeded with (seed, step), and a batch is a function of (seed,
position): a run that was stopped and resumed takes the same steps as one that was not.
"""

import dataclasses
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from data_loader import Loader
from datasets.labels import Labels, list_classes
from errors import UserError, warn
from metrics.evaluation import check_metrics, compute_metrics
from metrics.scores import DISTANCES
from networks.augmentation import RANDOM_NUMBERS, augment
from networks.latents import as_arguments, sample_z
from networks.losses import LOSSES, gradient_penalty
from parameter import Config
from sagan_models import gammas_and_sigmas
from training.checkpoint import Checkpoint, reraise_load_errors
from training.cuda_graph import GraphedStep, can_capture
from training.distributed import Ranks, SyncSchedule
from training.divergence import NonFiniteError, NonFiniteGuard
from training.models import MODELS, network_options
from training.monitor import Monitor
from training.overfitting import OverfittingCheck
from training.recorder import Recorder
from training.resuming import (
    changed_options,
    load_resume_checkpoint,
    non_finite_message,
    warn_of_other_images,
    warn_of_trained_holdout,
)
from training.run_folders import check_folders, warn_of_small_disk
from training.schedule import Schedule
from utils import (
    EMA,
    SEED_FIXED_Z,
    SEED_METRICS,
    SEED_STEP,
    StopSignals,
    autocast,
    conv_memory_format,
    derive_seed,
    eval_mode,
    make_deterministic,
    no_param_grads,
    resolve_device,
    resolve_precision,
    set_learning_rate,
)


class Trainer:
    """Train G and D on a loader's batches, as one of `ranks`.

    Attributes:
        G, D: the networks, in training mode.
        ema: the EMA of G; its network is `ema.network`.
        step: finished generator updates.

    Raises:
        UserError: the device is not available, or the checkpoint to resume from is missing or does not fit.
    """

    def __init__(self, loader: Loader, config: Config, ranks: Ranks = Ranks()):  # noqa: B008  it is immutable
        self.loader, self.config, self.ranks = loader, config, ranks
        self.classes = loader.classes if config.conditional else ()
        self.augmentations = config.augment.split(",") if config.augment != "none" else []
        with ranks.raise_together():
            self.device = resolve_device(config.device, ranks.local_rank if ranks.size > 1 else None)
            self.precision = resolve_precision(config.precision, self.device)
            self.shard = ranks.shard(config.batch_size)  # this rank's part of each batch
            use_graph = can_capture(self.device, config.cuda_graph, ranks.size)
        self.memory_format = conv_memory_format(self.device, self.precision)
        self.step = 0
        self.saved_schedule: dict[str, Any] | None = None
        self.saved_data: dict[str, int] | None = None

        # Backends. Shapes never change, so cuDNN may search for its fastest algorithms, unless runs must be repeatable.
        if config.deterministic:
            make_deterministic()
        torch.backends.cudnn.benchmark = self.device.type == "cuda" and not config.deterministic

        # Networks
        model, options = MODELS[config.model], network_options(len(self.classes), config.attention)
        self.G = model.make_G(config.imsize, config.z_dim, config.g_conv_dim, **options)
        self.G = ranks.convert_sync_batchnorm(self.G, self.device)
        self.D = model.make_D(config.imsize, config.d_conv_dim, **options)
        for network in (self.G, self.D):
            network.to(self.device, memory_format=self.memory_format)
        self.ema = EMA(self.G, config.ema_decay)
        self.G_ddp, self.D_ddp = ranks.wrap_ddp(self.G), ranks.wrap_ddp(self.D)  # all-reduce gradients in backward

        # Loss, optimizers, latents
        self.d_loss, self.g_loss = LOSSES[config.adv_loss]
        self.g_optimizer = self._adam(self.G, config.g_lr, use_graph)
        self.d_optimizer = self._adam(self.D, config.d_lr, use_graph)
        self.rng = torch.Generator(self.device)
        self.fixed_z = sample_z(derive_seed(config.seed, SEED_FIXED_Z), config.batch_size, config.z_dim, self.device)
        self.guard = NonFiniteGuard(self.device)

        # The updates of a step, eager or as a CUDA graph. The checkpoint must be loaded before the capture.
        self.updates = self._updates
        if use_graph:
            self.updates = GraphedStep(self._updates, self.device, fallback=config.cuda_graph == "auto")
        if saved := ranks.on_rank_zero(load_resume_checkpoint, config, self.classes):
            with ranks.raise_together():
                self._resume(saved)
        self.monitor = Monitor(config, loader, self.G, self.ema.network, self.D, self.fixed_z, self.precision)

    def d_step(
        self,
        real: Tensor,
        z: Tensor,
        mix: Tensor | None = None,
        real_labels: Tensor | None = None,
        fake_labels: Tensor | None = None,
        u: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Update D once.

        Args:
            real: images (B, 3, S, S) in [-1, 1].
            z: latents (B, z_dim).
            mix: interpolation coefficients (B, 1, 1, 1) of the gradient penalty; needed by wgan-gp only.
            real_labels, fake_labels: classes (B,) of the real images and of those to generate; needed by conditional
                networks only. The penalty uses those of the real images.
            u: random numbers in [0, 1) for `--augment` (B, 2, 7), of the real and of the generated images.

        Returns:
            d_loss_real, d_loss_fake, d_loss (their sum, plus the weighted d_penalty under wgan-gp), the mean logits
            d_real and d_fake, the mean sign of those of real images d_sign: detached 0-d tensors on the device.
        """
        real_label, fake_label = as_arguments(real_labels), as_arguments(fake_labels)
        with autocast(self.device, self.precision):
            with torch.no_grad():
                fake = self.G_ddp(z, *fake_label).float()
            if u is not None:
                real, fake = augment(real, u[:, 0], self.augmentations), augment(fake, u[:, 1], self.augmentations)
            real_logits, fake_logits = self.D_ddp(real, *real_label).float(), self.D_ddp(fake, *fake_label).float()
        loss_real, loss_fake = self.d_loss(real_logits, fake_logits)
        stats = {
            "d_loss_real": loss_real,
            "d_loss_fake": loss_fake,
            "d_loss": loss_real + loss_fake,
            "d_real": real_logits.mean(),
            "d_fake": fake_logits.mean(),
            "d_sign": real_logits.sign().mean(),
        }
        if self.config.adv_loss == "wgan-gp":
            # D, not D_ddp: the gradients of loss and penalty are all-reduced once, in the backward of their sum.
            # Through explicit attention maps: the fused attention kernels have no double backward.
            stats["d_penalty"] = gradient_penalty(
                lambda images: self.D(images, *real_label, return_attention=True)[0], real, fake, mix
            )
            stats["d_loss"] = stats["d_loss"] + self.config.lambda_gp * stats["d_penalty"]
        self.d_optimizer.zero_grad()
        stats["d_loss"].backward()
        self.d_optimizer.step()
        return {name: value.detach() for name, value in stats.items()}

    def g_step(self, z: Tensor, labels: Tensor | None = None, u: Tensor | None = None) -> dict[str, Tensor]:
        """Update G once.

        Args:
            z: latents (B, z_dim).
            labels: classes (B,), if G is conditional.
            u: random numbers in [0, 1) for `--augment` (B, 7).

        Returns:
            g_loss, a detached 0-d tensor on the device.
        """
        label = as_arguments(labels)
        with no_param_grads(self.D):  # only G is updated
            with autocast(self.device, self.precision):
                fake = self.G_ddp(z, *label)
                if u is not None:
                    fake = augment(fake.float(), u, self.augmentations)
                loss = self.g_loss(self.D(fake, *label).float())
            self.g_optimizer.zero_grad()
            loss.backward()
        self.g_optimizer.step()
        return {"g_loss": loss.detach()}

    def _updates(
        self,
        real: Sequence[Tensor],
        z: Sequence[Tensor],
        mix: Sequence[Tensor] = (),
        real_labels: Sequence[Tensor] = (),
        fake_labels: Sequence[Tensor] = (),
        u: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Update D on each real batch, then G on the last z. A function of its inputs, so that it can be captured."""
        for given in zip_longest(real, z[:-1], mix, real_labels, fake_labels[:-1], u[:-1]):
            stats = self.d_step(*given)
        return stats | self.g_step(z[-1], fake_labels[-1] if fake_labels else None, u[-1] if u else None)

    def train_step(self) -> dict[str, Tensor]:
        """Take one step: `n_critic` updates of D on fresh batches, one of G, then the EMA.

        Returns:
            The losses and logits of the last update of each network, see `d_step` and `g_step`.
        """
        config, size = self.config, self.config.batch_size
        self.rng.manual_seed(derive_seed(config.seed, SEED_STEP, self.step))
        factor = self.schedule.factor(self.step)
        set_learning_rate(self.g_optimizer, config.g_lr * factor)
        set_learning_rate(self.d_optimizer, config.d_lr * factor)
        positions = range(self.step * config.n_critic, (self.step + 1) * config.n_critic)
        real = [self._real(position, self.shard) for position in positions]
        # Every rank draws the numbers of the whole batch and uses its shard: the same numbers for any world size.
        z = [self._draw(torch.randn, size, config.z_dim) for _ in range(config.n_critic + 1)]
        penalties = config.n_critic if config.adv_loss == "wgan-gp" else 0
        mix = [self._draw(torch.rand, size, 1, 1, 1) for _ in range(penalties)]
        real_labels, fake_labels = [], []
        if self.classes:
            real_labels = [self.loader.batch_labels(position, self.shard) for position in positions]
            # Those of training images drawn at random: classes are as frequent as among the real images.
            draw_image = partial(torch.randint, len(self.loader.training_labels))
            fake_labels = [self.loader.training_labels[self._draw(draw_image, size)] for _ in z]
        u = []
        if self.augmentations:
            u = [self._draw(torch.rand, size, 2, RANDOM_NUMBERS) for _ in real]
            u.append(self._draw(torch.rand, size, RANDOM_NUMBERS))
        stats = self.updates(real, z, mix, real_labels, fake_labels, u)
        self.ema.update(self.step)
        self.step += 1
        self.guard.add(self.step, stats)
        return stats

    def train(self) -> int:
        """Train until `total_step`, or until SIGINT or SIGTERM, which save a checkpoint.

        Returns:
            The exit code: 0, or 128 + the number of the signal.

        Raises:
            UserError: a result folder cannot be written or is in use, the data cannot be read, or the run diverged.
        """
        config, ranks = self.config, self.ranks
        ranks.on_rank_zero(check_folders, config, self.step)
        ranks.on_rank_zero(check_metrics, config, self.device)
        ranks.rank_zero_first(self.loader.open)
        self._check_same_images()
        ranks.on_rank_zero(warn_of_other_images, self.saved_data, self.loader.identity)
        if self.step:
            ranks.on_rank_zero(warn_of_trained_holdout, self.saved_data, self.loader.identity)
        try:
            with ExitStack() as stack:
                stop = stack.enter_context(StopSignals())
                with ranks.raise_together():
                    recorder = self._open_recorder(stack) if ranks.is_rank_zero else None
                print(config.summary())
                print(f"data: {self.loader.source.description}")
                if self.classes:
                    print(f"classes: {list_classes(Labels(self.classes, self.loader.labels.tolist()))}")
                print(
                    f"training {config.model} at {config.imsize}x{config.imsize} on {self.device} in {self.precision}, "
                    f"world size {ranks.size}, global batch {config.batch_size}, {len(self.loader)} batches per epoch"
                )
                signal_number = self._loop(recorder, stop)
        except NonFiniteError as error:  # by now, all earlier checkpoints are on the disk
            raise UserError(non_finite_message(config, error)) from error
        self._print_outcome(signal_number)
        return 128 + signal_number if signal_number else 0

    @cached_property
    def schedule(self) -> Schedule:
        """The learning rate's schedule. Needs the opened loader, as an epoch is as long as there are images."""
        config = self.config
        schedule = Schedule(config.lr_schedule, config.lr_decay, config.total_step, len(self.loader) / config.n_critic)
        return schedule.resumed(Schedule(**self.saved_schedule), self.step) if self.saved_schedule else schedule

    @cached_property
    def overfitting(self) -> OverfittingCheck:
        """Notices that D remembers the training images. Needs the opened loader."""
        epoch = len(self.loader) // self.config.n_critic
        return OverfittingCheck(epoch, bool(self.config.holdout), bool(self.augmentations))

    @property
    def save_step(self) -> int:
        """Steps between checkpoints."""
        epochs = self.config.model_save_step * len(self.loader) / self.config.n_critic
        return max(self.config.min_save_step, round(epochs))

    def _loop(self, recorder: Recorder | None, stop: StopSignals) -> int:
        """Take steps until `total_step` or a signal to any rank; rank 0 records. Returns the signal's number, or 0."""
        config, ranks = self.config, self.ranks
        sync = SyncSchedule(ranks, self.step)
        with ranks.raise_together():
            if recorder and self.step:
                self._record_start(recorder, stop)
        signal_number = ranks.max(stop.received)
        while self.step < config.total_step and not signal_number:
            stats = self.train_step()
            due = self._due()
            if "log" in due:
                stats = ranks.mean(stats)
            if due or sync.is_due(self.step):
                with ranks.raise_together():  # the other ranks wait here for what rank 0 writes
                    if recorder:
                        self._record(recorder, due, stats, stop)
                signal_number = ranks.max(stop.received)
                sync.done(self.step)
        with ranks.raise_together():
            if recorder:
                if signal_number and recorder.saved_step != self.step:
                    recorder.checkpoint(self.step, self._state())
                if config.attention == "full":
                    attention = self.monitor.attention()
                    recorder.attention(self.step, attention)
                    recorder.explorer(self.step, attention)
        return signal_number

    def _due(self) -> set[str]:
        """Return the names of what is due after this step; after the last step all of them, attention by `_loop`."""
        config = self.config
        every = {"log": config.log_step, "samples": config.sample_step, "checkpoint": self.save_step}
        every |= {"metrics": config.metric_step} if config.metrics else {}
        due = {name for name, steps in every.items() if self.step % steps == 0 or self.step == config.total_step}
        return due | {"attention"} if self.step % config.attn_step == 0 else due

    def _record(self, recorder: Recorder, due: set[str], stats: dict[str, Tensor], stop: StopSignals) -> None:
        """Record what is due: the checkpoint before all that takes time. It is also due by the clock."""
        config = self.config
        recorder.advance(self.step)
        if due:
            self.guard.check_losses()
        if "log" in due:
            tensors = stats | gammas_and_sigmas("G", self.G) | gammas_and_sigmas("D", self.D)
            tensors |= self.monitor.holdout_logits(self.step) if config.holdout else {}
            recorder.log(self.step, tensors, self._learning_rates())
            if config.adv_loss == "hinge":  # the critic of wgan-gp has no zero
                self.overfitting.add(self.step, stats["d_sign"].item())
        if "checkpoint" in due:
            recorder.checkpoint(self.step, self._state())
        elif recorder.is_save_overdue():
            recorder.checkpoint(self.step, self._state(), export=False)
        if "samples" in due:
            recorder.samples(self.step, self.monitor.samples())
        if "attention" in due:
            recorder.attention(self.step, self.monitor.attention())
        if "metrics" in due:
            self._evaluate(recorder, stop)

    def _record_start(self, recorder: Recorder, stop: StopSignals) -> None:
        """Record what a resumed run may lack: the first checkpoint of a branch, and what follows a checkpoint."""
        due, is_branch = self._due(), self.config.pretrained_file is not None
        if is_branch:
            recorder.checkpoint(self.step, self._state())
        if is_branch or "samples" in due:
            recorder.samples(self.step, self.monitor.samples())
        if "attention" in due:
            recorder.attention(self.step, self.monitor.attention())
        if "metrics" in due and not recorder.has_scores(self.step):
            self._evaluate(recorder, stop)

    def _evaluate(self, recorder: Recorder, stop: StopSignals) -> None:
        """Log the metrics of the EMA generator (of G without --use_ema), and save the best checkpoint; until a signal.

        The best one has the lowest of the first of `--metrics` that is a distance.
        """
        config, network = self.config, self.ema.network if self.config.use_ema else self.G
        z = sample_z(derive_seed(config.seed, SEED_METRICS), config.metric_num, config.z_dim, self.device)
        try:
            with eval_mode(network):
                scores = compute_metrics(config, network, z, self.loader, lambda: stop.received > 0)
        except UserError as error:  # such as a full disk: no reason to stop training
            warn(f"metrics skipped at step {self.step}: {error}")
            return
        recorder.scores(self.step, scores)
        if distance := next((name for name in config.metrics.split(",") if name in DISTANCES), None):
            best = {"step": self.step, "score": scores[distance], "metric": distance, "images": config.metric_num,
                    "ema": config.use_ema, "data": self.loader.identity["checksum"],
                    "extractor": config.feature_extractor}  # fmt: skip
            if recorder.is_best(best):
                recorder.checkpoint("best", self._state() | {"best": best})

    def _check_same_images(self) -> None:
        """Raise `UserError` if another rank decoded other images."""
        identity = self.loader.identity
        same = self.ranks.size == 1 or self.ranks.all_equal(identity["checksum"] ^ identity["held_out_checksum"])
        with self.ranks.raise_together():
            if not same:
                raise UserError(
                    "the machines have different images or labels: copy the images, or --cache_path, to all of them"
                )

    def _open_recorder(self, stack: ExitStack) -> Recorder:
        skipped, total = self.loader.skipped, len(self.loader.source.items)
        recorder = Recorder(self.config, self.step, self.device, self.precision, skipped, total, self.classes)
        stack.enter_context(recorder)
        warn_of_small_disk(self.config, (self.G, self.D))
        recorder.real_images(self.monitor.real_images(), "real")
        if self.augmentations:
            recorder.real_images(self.monitor.augmented_images(self.augmentations), "augmented")
        return recorder

    def _print_outcome(self, signal_number: int) -> None:
        """Print how to resume after a signal, otherwise which files to open first."""
        config = self.config
        if signal_number:
            print(f"{signal.Signals(signal_number).name}: checkpoint saved at step {self.step}. Resume with:")
            print(f"  {config.command_line(pretrained_model=str(self.step))}")
            return
        print(f"training finished at step {self.step}. Open first:")
        for path in (
            config.log_folder / "report.html",
            *([config.attn_folder / f"{self.step}_explorer.html"] if config.attention == "full" else []),
            config.sample_folder / f"{self.step}_ema.png",
        ):
            print(f"  {path}")

    def _real(self, position: int, rows: slice) -> Tensor:
        """Return rows of a batch of real images in the memory format of the networks."""
        return self.loader.batch(position, rows).contiguous(memory_format=self.memory_format)

    def _draw(self, distribution: Callable[..., Tensor], *shape: int) -> Tensor:
        """Draw random numbers for the whole batch and return this rank's: independent of the number of ranks."""
        return distribution(shape, device=self.device, generator=self.rng)[self.shard]

    def _adam(self, network: nn.Module, lr: float, capturable: bool) -> torch.optim.Adam:
        if self.device.type == "cuda":
            lr = torch.tensor(lr, device=self.device)  # a captured step reads the tensor at each replay
        betas = (self.config.beta1, self.config.beta2)
        return torch.optim.Adam(network.parameters(), lr, betas, fused=True, capturable=capturable)

    def _learning_rates(self) -> dict[str, float]:
        """Learning rates of the step that was just taken."""
        factor = self.schedule.factor(self.step - 1)
        return {"lr/g": self.config.g_lr * factor, "lr/d": self.config.d_lr * factor}

    def _state(self) -> dict[str, Any]:
        """Return all that the next step depends on; random numbers and data are functions of the seed and the step.

        Raises:
            NonFiniteError: a tensor in it is not finite.
        """
        state = {
            "step": self.step,
            "config": dataclasses.asdict(self.config),
            "G": self.G.state_dict(),
            "D": self.D.state_dict(),
            "ema": self.ema.network.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "fixed_z": self.fixed_z,
            "schedule": dataclasses.asdict(self.schedule),
            "data": self.loader.identity,
            "classes": list(self.classes),
        }
        self.guard.check(state)
        return state

    def _resume(self, saved: Checkpoint) -> None:
        """Load a checkpoint. Those of the reference, and old ones without their state file, have weights only."""
        self.step = saved.step
        with reraise_load_errors(saved.step):
            self.G.load_state_dict(saved.G)
            self.D.load_state_dict(saved.D)
            self.ema.network.load_state_dict(saved.state["ema"] if saved.state else saved.G)
        if saved.state is None:
            if saved.step:  # weights of step 0 are initial ones
                warn(f"checkpoint {saved.step} has weights only: optimizers and EMA are reinitialized")
            return
        with reraise_load_errors(saved.step):
            self.fixed_z = saved.state["fixed_z"].to(self.device)
            # Checkpoints of older versions do not have these.
            self.saved_schedule, self.saved_data = saved.state.get("schedule"), saved.state.get("data")
            for name, optimizer in (("g_optimizer", self.g_optimizer), ("d_optimizer", self.d_optimizer)):
                # Learning rates and betas are this run's options, not the saved ones.
                groups = optimizer.state_dict()["param_groups"]
                optimizer.load_state_dict({"state": saved.state[name]["state"], "param_groups": groups})
                for parameter, moments in optimizer.state.items():
                    for key in ("exp_avg", "exp_avg_sq"):  # fused Adam needs the memory format of the parameter
                        moments[key] = torch.empty_like(parameter).copy_(moments[key])
            changes = changed_options(saved.state["config"], self.config)
        print(f"resuming from step {self.step}" + (f"; changed options: {', '.join(changes)}" if changes else ""))
