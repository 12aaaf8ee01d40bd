"""A whole step of fine-tuning, against one written from the formulas alone: a plain transformer in float64, pixels that
are erased, cut and blended one clip after another, soft targets, AdamW."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import videomae
from tests.recorder import Recorder
from train.engine import Compiled, Engine, Graphs
from train.finetune import Finetuning
from train.finetune_recipes import FINETUNE, FinetuneData
from train.log import RunLog
from train.loop import _step
from train.memory import estimate
from train.optim import FinetuneOptim
from train.run import prepare
from train.skipped import Skipped
from videomae.blocks import RECOMPUTE, set_recompute
from videomae.data.dataset import Order
from videomae.data.feed import OnDevice
from videomae.data.loader import Batch, Skip
from videomae.data.mix import Erasing, Mixing, draw_erasing
from videomae.keys import Draws, key
