"""Kinds of training that see clips without labels, and are probed now and then for what their features are worth."""

import sys
from typing import TypeVar

from kernels.launch import check
from train.inference import Reading
from train.log import RunLog
from train.moco_recipes import MocoConfig
from train.optim import PRECISIONS
from train.probing import OnlineProbe
from train.recipes import PretrainConfig
from train.run import Run, check_reader, demo_list, demo_scenes, warn_of
from train.verb import Verb
from videomae.data import storage
from videomae.data.dataset import VideoList, find_videos
from videomae.data.sampling import Sampling
from videomae.model import Encoder, Input, VideoMAE
from videomae.wording import counted

C = TypeVar("C", PretrainConfig, MocoConfig)


class UnlabelledVerb(Verb[C]):
    """One kind of training on videos alone."""

    _probe: OnlineProbe | None = None

    @property
    def input(self) -> Input:
        return self.config.model.input

    @property
    def recompute(self) -> str:
        return self.config.model.recompute

    def find_videos(self) -> VideoList:
        data, stride = self.config.data, self.config.sampling.stride
        if data.path is None:
            rendered = {"demo": demo_list, "demo-scenes": lambda: demo_scenes() / "train"}
            recipe = self.config.recipe
            check(recipe in rendered, f"recipe {recipe} needs --data: a folder of videos, or a list file")
            return find_videos(rendered[recipe]())
        storage.configure(data.cache_of(data.path))
        videos = find_videos(data.path, data.root)
        warn_of(videos)
        check(
            stride % videos.step == 0,
            f"{data.path} holds frames 0, {videos.step}, {2 * videos.step}, ... only: --sampling.stride must be a "
            f"multiple of {videos.step}, not {stride}",
        )
        check_reader(data, videos)
        return videos

    def ready(self, run: Run) -> None:
        config = self.config
        if config.probe.data is None:
            return
        storage.configure(config.data.cache_of(config.probe.data))
        self._probe = OnlineProbe(
            config.probe,
            self.input,
            Sampling("dense", config.sampling.stride),
            seed=config.seed,
            reading=Reading(run.workers, config.loader, config.data.cache_of(config.probe.data)),
            decoder=config.data.decoder,
            say=lambda text: print(text, file=sys.stderr),
        )

    def describe_probe(self) -> list[str]:
        if self._probe is None:
            return []
        train, test = self._probe.counts
        every, labelled = counted(self.config.probe.every, "step"), counted(train, "labelled clip")
        return [f"probe     every {every}, {labelled} tell {test:,} others apart"]

    def begin(self, run: Run, log: RunLog) -> None:
        if run.start == 0:
            self._look(run, log, 0)

    def looks_after(self, run: Run, done: int) -> bool:
        return self._probes_after(run, done)

    def _probes_after(self, run: Run, done: int) -> bool:
        return done % self.config.probe.every == 0 or done == run.schedule.steps

    def after_step(self, run: Run, log: RunLog, done: int) -> None:
        if self._probes_after(run, done):
            self._look(run, log, done)

    def _look(self, run: Run, log: RunLog, done: int) -> None:
        """What the features are worth after so many steps, where the user wants to know."""
        if self._probe is None:
            return
        assert isinstance(run.model, VideoMAE | Encoder)
        with log.pause():
            found = self._probe.probe(run.model, PRECISIONS[run.precision])
            log.evaluated(done, found)
        text = ", ".join(f"{name.removeprefix('probe_')} {value:.1f} %" for name, value in found.items())
        log.say(f"probe after step {done}: {text}")
