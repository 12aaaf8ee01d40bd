"""How a run is asked to stop."""

import signal

import pytest

from train import signals
from train.signals import stop_signals


def test_a_first_signal_is_noted_in_the_words_of_the_loop_and_a_second_ends_it(capsys):
    with stop_signals("this film; once more to stop at once") as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop == [signal.SIGTERM]
        assert capsys.readouterr().err == "\nstopping after this film; once more to stop at once\n"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
    assert "after this step; once more to stop at once, without saving" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_request_that_a_scheduler_and_torchrun_both_pass_on_is_one(number, monkeypatch):
    with stop_signals() as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop == [number]
        monkeypatch.setattr(signals, "_TWICE", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
