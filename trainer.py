"""Training: per step `n_critic` updates of the discriminator, one of the generator, and the EMA.

    Trainer(config, loader, device).train()

All random numbers of a step come from one generator seeded with (seed, step), and a batch is a function of (seed,
number): a run that was stopped and resumed takes the same steps as one that was not.
"""

from contextlib import ExitStack

import torch
from torch import Tensor

from data_loader import Loader
from errors import StopFn, UserError, stop_on_signals, warn
from metrics.scores import compute_metrics
from networks.augmentation import RANDOM_NUMBERS, augment
from networks.ema import EMA
from networks.losses import LOSSES, gradient_penalty
from parameter import Config
from training.checkpoint import Checkpoint, has_state
from training.cuda_graph import GraphedStep, can_capture
from training.distributed import Ranks
from training.guards import NonFiniteGuard
from training.models import build_networks
from training.optimizers import Adam, lr_decay
from training.previews import Previews, draw_z
from training.recorder import Recorder
from training.resuming import TrainingState, is_holdout_trained
from utils import SEED_FIXED_Z, SEED_STEP, autocast, derive_seed, eval_mode, no_param_grads

SYNC_STEPS = 10  # steps between the exchanges of signals and errors by several ranks


class Trainer:
    """Train G and D on a loader's batches, as one of `ranks`.

    Args:
        loader: opened.
        device, precision: from `setup_device` and `set_backends`.
        saved: the checkpoint to resume or start from; None for a new run.

    Attributes:
        G, D: the networks, in training mode.
        ema: the EMA of G; its network is `ema.network`.
        step: finished generator updates.

    Raises:
        UserError: the batch cannot be shared, or the checkpoint does not fit.
    """

    def __init__(
        self,
        config: Config,
        loader: Loader,
        device: torch.device,
        precision: str = "fp32",
        ranks: Ranks = Ranks(),  # noqa: B008  it is immutable
        saved: Checkpoint | None = None,
    ):
        self.config, self.loader, self.device, self.precision, self.ranks = config, loader, device, precision, ranks
        self.shard = ranks.shard(config.batch_size)  # this rank's part of each batch
        use_graph = can_capture(device, config.cuda_graph, ranks.size)

        # Networks
        G, D = build_networks(config, len(loader.classes))
        self.G = ranks.convert_sync_batchnorm(G, device).to(device, memory_format=loader.memory_format)
        self.D = D.to(device, memory_format=loader.memory_format)
        self.ema = EMA(self.G, config.ema_decay)
        self.G_ddp, self.D_ddp = ranks.wrap_ddp(self.G), ranks.wrap_ddp(self.D)  # all-reduce gradients in backward

        # Loss, optimizers, random numbers
        self.loss = LOSSES[config.adv_loss]
        self.augmentations = config.augment.split(",") if config.augment != "none" else []
        betas = float(config.beta1), float(config.beta2)  # Adam refuses integers
        self.g_optimizer = Adam(self.G.parameters(), config.g_lr, betas, capturable=use_graph)
        self.d_optimizer = Adam(self.D.parameters(), config.d_lr, betas, capturable=use_graph)
        self.rng = torch.Generator(device)
        fixed_z = draw_z(config, config.batch_size, device, SEED_FIXED_Z)
        self.guard = NonFiniteGuard(device)

        # The state of the run; a checkpoint must be loaded before the capture of a graph.
        self.state = TrainingState(0, self.G, self.D, self.ema.network, self.g_optimizer, self.d_optimizer, fixed_z)
        if saved:
            self.state.load(saved)
            if saved.state and saved.state["config"].get("lr_schedule") != config.lr_schedule:
                self.state.lr_factor = 1.0  # another schedule starts anew
        self.holdout_is_trained = saved is not None and is_holdout_trained(saved, loader.fingerprint)
        self.updates = self._updates
        if use_graph:
            self.updates = GraphedStep(self._updates, device, fallback=config.cuda_graph == "auto")
        self.previews = Previews(config, loader, self.state, self.precision)

    @property
    def step(self) -> int:
        return self.state.step

    def d_step(
        self,
        real: Tensor,
        z: Tensor,
        real_labels: Tensor | None = None,
        fake_labels: Tensor | None = None,
        alpha: Tensor | None = None,
        aug_noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Update D once on real images (B, 3, S, S) in [-1, 1], and on those that G makes of latents z (B, z_dim).

        Labels are (B,); alpha (B, 1, 1, 1) is for the gradient penalty, aug_noise (B, 2, 7) in [0, 1), for real and
        generated images, for `augment`. Returns detached 0-d tensors: d_loss_real, d_loss_fake, d_loss (their sum, and
        the weighted d_penalty), the mean logits d_real and d_fake, and of hinge d_sign, the mean sign of the real ones.
        """
        with autocast(self.device, self.precision):
            with torch.no_grad():
                fake = self.G_ddp(z, fake_labels).float()
            if aug_noise is not None:
                real = augment(real, aug_noise[:, 0], self.augmentations)
                fake = augment(fake, aug_noise[:, 1], self.augmentations)
            # Each forward in training mode takes a step of power iteration: two of D here, a third one for the penalty.
            real_logits, fake_logits = self.D_ddp(real, real_labels).float(), self.D_ddp(fake, fake_labels).float()
        loss_real, loss_fake = self.loss.of_D(real_logits, fake_logits)
        stats = {"d_loss_real": loss_real, "d_loss_fake": loss_fake, "d_loss": loss_real + loss_fake}
        stats |= {"d_real": real_logits.mean(), "d_fake": fake_logits.mean()}
        if self.loss.has_penalty:
            # D, not D_ddp: the gradients of loss and penalty are all-reduced once, in the backward of their sum.
            # Through explicit attention maps: the fused attention kernels have no double backward.
            critic = lambda images: self.D(images, real_labels, return_attention=True)[0]  # noqa: E731
            stats["d_penalty"] = gradient_penalty(critic, real, fake, alpha)
            stats["d_loss"] = stats["d_loss"] + self.config.lambda_gp * stats["d_penalty"]
        else:  # a critic with a penalty has no zero
            stats["d_sign"] = real_logits.sign().mean()
        self.d_optimizer.zero_grad()
        stats["d_loss"].backward()
        self.d_optimizer.step()
        return {name: value.detach() for name, value in stats.items()}

    def g_step(
        self, z: Tensor, fake_labels: Tensor | None = None, aug_noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Update G once. Inputs as in `d_step`, aug_noise (B, 7). Returns g_loss, a detached 0-d tensor."""
        with no_param_grads(self.D):  # only G is updated
            with autocast(self.device, self.precision):
                fake = self.G_ddp(z, fake_labels)
                if aug_noise is not None:
                    fake = augment(fake.float(), aug_noise, self.augmentations)
                loss = self.loss.of_G(self.D(fake, fake_labels).float())
            self.g_optimizer.zero_grad()
            loss.backward()
        self.g_optimizer.step()
        return {"g_loss": loss.detach()}

    def _updates(self, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Update D with each of these inputs but the last, G with the last. Draws no numbers: it can be captured."""
        *of_D, of_G = inputs
        for given in of_D:
            stats = self.d_step(**given)
        return stats | self.g_step(**of_G)

    def _draw_inputs(self) -> list[dict[str, Tensor]]:
        """Return the inputs of the step's updates: `n_critic` of D, and one of G."""
        config, loader = self.config, self.loader

        def draw(distribution, *shape: int, limits: tuple = ()) -> Tensor:
            # Every rank draws the numbers of the whole batch and uses its shard: the same for any number of ranks.
            shape = config.batch_size, *shape
            return distribution(*limits, shape, device=self.device, generator=self.rng)[self.shard]

        self.rng.manual_seed(derive_seed(config.seed, SEED_STEP, self.step))
        inputs = [{"z": draw(torch.randn, config.z_dim)} for _ in range(config.n_critic + 1)]
        *of_D, of_G = inputs
        for index, given in enumerate(of_D, start=self.step * config.n_critic):
            given["real"], labels = loader.batch(index, self.shard)
            if labels is not None:
                given["real_labels"] = labels
        if self.loss.has_penalty:
            for given in of_D:
                given["alpha"] = draw(torch.rand, 1, 1, 1)
        if loader.classes:
            for given in inputs:  # those of random training images: as frequent as among the real ones
                rows = draw(torch.randint, limits=(0, len(loader.training_labels)))
                given["fake_labels"] = loader.training_labels[rows]
        if self.augmentations:
            for given in of_D:
                given["aug_noise"] = draw(torch.rand, 2, RANDOM_NUMBERS)
            of_G["aug_noise"] = draw(torch.rand, RANDOM_NUMBERS)
        return inputs

    def train_step(self) -> dict[str, Tensor]:
        """Take one step: `n_critic` updates of D on fresh batches, one of G, then the EMA.

        Returns:
            The losses and logits of the last update of each network, see `d_step` and `g_step`.
        """
        self.g_optimizer.set_learning_rate(self.config.g_lr * self.state.lr_factor)
        self.d_optimizer.set_learning_rate(self.config.d_lr * self.state.lr_factor)
        stats = self.updates(self._draw_inputs())
        self.ema.update(self.step)
        self.state.step += 1
        self.state.lr_factor *= lr_decay(self.config, self.step, len(self.loader))
        self.guard.add(self.step, stats)
        return stats

    def train(self) -> int:
        """Train until `total_step`, or until a signal of `errors.stop_signals`; save a checkpoint at the end.

        Returns:
            The number of the signal, or 0.

        Raises:
            UserError: a result folder cannot be written or is in use.
            NonFiniteError: the run diverged; by then, all earlier checkpoints are on the disk.
        """
        config, previews, recorder = self.config, self.previews, None
        machine = f"{self.device} in {self.precision}"
        with ExitStack() as stack:
            stop = stack.enter_context(stop_on_signals())
            with self.ranks.raise_together():
                if self.ranks.rank == 0:
                    recorder = stack.enter_context(Recorder(config, self.step, machine, self.loader))
                    recorder.real_images("real", previews.real_images())
                    if self.augmentations:
                        recorder.real_images("augmented", previews.augmented_images())
            print(
                f"training {config.model} at {config.imsize}x{config.imsize} on {machine}, "
                f"world size {self.ranks.size}, global batch {config.batch_size}, {len(self.loader)} batches per epoch"
            )
            return self._loop(recorder, stop)

    def _loop(self, recorder: Recorder | None, stop: StopFn) -> int:
        """Take steps until `total_step`, or a signal to any rank, whose number is returned. Rank 0 has the recorder."""
        config, ranks = self.config, self.ranks
        save_step = max(config.min_save_step, round(config.model_save_step * len(self.loader) / config.n_critic))
        intervals = {"log": config.log_step, "checkpoint": save_step, "samples": config.sample_step}
        intervals |= {"attention": config.attn_step} if config.has_attention else {}
        intervals |= {"metrics": config.metric_step} if config.metrics else {}

        def due_now() -> set[str]:
            is_last = self.step == config.total_step
            return {name for name, steps in intervals.items() if self.step % steps == 0 or is_last}

        with ranks.raise_together():
            if recorder and self.step:
                self._record_resumed(recorder, due_now(), stop)
        signal_number = ranks.max(stop())
        while self.step < config.total_step and not signal_number:
            lr_factor, stats = self.state.lr_factor, self.train_step()
            due = due_now()
            if ranks.size > 1 and not due and self.step % SYNC_STEPS:
                continue
            if "log" in due:
                stats = ranks.mean(stats)
            with ranks.raise_together():  # the other ranks wait here for what rank 0 computes
                if recorder:
                    self._record(recorder, due, stats, lr_factor, stop)
            signal_number = ranks.max(stop())

        with ranks.raise_together():
            if recorder and signal_number and recorder.saved_step != self.step:
                recorder.checkpoint(self.step, self._saved_state())
            if recorder and config.has_attention and self.step:
                attention = self.previews.attention()
                recorder.attention(self.step, attention)
                recorder.explorer(self.step, attention)
        return signal_number

    def _record_resumed(self, recorder: Recorder, due: set[str], stop: StopFn) -> None:
        """Record what the run that is resumed may lack: a branch its checkpoint, and what follows a checkpoint."""
        is_branch = self.config.pretrained_file is not None
        # Such as of the best checkpoint: later ones are removed, and "latest" must find this one.
        if is_branch or not has_state(self.config.model_folder, self.step):
            recorder.checkpoint(self.step, self._saved_state(), export=is_branch)
        if is_branch or "samples" in due:
            recorder.samples(self.step, self.previews.samples())
        if "attention" in due:
            recorder.attention(self.step, self.previews.attention())
        if "metrics" in due:
            self._evaluate(recorder, stop)

    def _record(
        self, recorder: Recorder, due: set[str], stats: dict[str, Tensor], lr_factor: float, stop: StopFn
    ) -> None:
        """Record a step and what is due after it; `lr_factor` is that of the step."""
        recorder.advance(self.step)
        if due:
            self.guard.check_losses()
        if "log" in due:
            recorder.log(self.step, stats | self.previews.scalars(self.step), lr_factor)
        if "checkpoint" in due or recorder.is_save_overdue():  # before all that takes time
            recorder.checkpoint(self.step, self._saved_state(), export="checkpoint" in due)
        if "samples" in due:
            recorder.samples(self.step, self.previews.samples())
        if "attention" in due and self.step < self.config.total_step and not stop():  # else after the loop
            recorder.attention(self.step, self.previews.attention())
        if "metrics" in due:
            self._evaluate(recorder, stop)

    def _evaluate(self, recorder: Recorder, stop: StopFn) -> None:
        """Record the metrics of the EMA generator (of G without --use_ema), and the checkpoint if it is the best."""
        network = self.ema.network if self.config.use_ema else self.G
        try:
            with eval_mode(network):
                scores = compute_metrics(self.config, network, self.loader, stop)
        except UserError as error:  # such as a full disk: no reason to stop training
            warn(f"metrics skipped at step {self.step}: {error}")
        else:
            if recorder.scores(self.step, scores):
                recorder.checkpoint("best", self._saved_state())

    def _saved_state(self) -> dict:
        """Return what a checkpoint has: all that the next step depends on, the options, and which images these are.

        Raises:
            NonFiniteError: a tensor in it is not finite.
        """
        state = self.state.state_dict()
        self.guard.check(state)
        data, classes = dict(self.loader.fingerprint), list(self.loader.classes)
        if self.holdout_is_trained:
            del data["seed"]  # as in older versions: each resume warns again
        return state | {"config": vars(self.config), "data": data, "classes": classes}
