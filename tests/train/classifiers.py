"""Small classifiers and labelled videos for tests of the commands that use them."""

import torch

from tests.videos import moving_frames, write_video
from videomae.classifier import Classifier
from videomae.data.sampling import Sampling
from videomae.model import Input, size_of
from videomae.weights import save_weights

NAMES = ("boil", "chop", "peel")


def tiny_classifier(path, *, num_classes=3, classes=None, sampling=None, seed=0, frames=4, image_size=16):
    """A random classifier in a file; its predictions differ from video to video."""
    torch.manual_seed(seed)
    input = Input(frames, image_size, (2, 8, 8), sampling=sampling)
    model = Classifier(size_of("vit_tiny"), input, num_classes=num_classes, init_scale=40.0)
    # as weights of a training: those of a fresh one hardly look at the pixels
    for name, parameter in model.named_parameters():
        if name.startswith("blocks"):
            torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim > 1 else None
    model.classes = classes
    save_weights(model, path)
    return model.eval()


DENSE, UNIFORM = Sampling("dense", 2), Sampling("uniform")


def write_labelled(folder, count=7, num_classes=3):
    """A list of videos of several lengths and shapes, upright ones too."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        height, width = ((40, 56), (52, 36), (32, 32))[i % 3]
        write_video(folder / f"{i}.mp4", moving_frames(9 + 4 * i, height, width, seed=i), crf="18")
        lines.append(f"{i}.mp4 {i % num_classes}\n")
    (folder / "test.csv").write_text("".join(lines))
    return folder / "test.csv"
