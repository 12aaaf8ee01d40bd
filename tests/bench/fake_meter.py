"""A meter for tests without a GPU."""

from bench.meter import Meter


class FakeMeter(Meter):
    """A device whose clock goes on when a step says so, and whose memory is what the test says."""

    how, has_memory = "events", True

    def __init__(self, free=10**10):
        self.now = self.held = self.most = self.tried = 0
        self.budget = free
        self.waits = []

    def mark(self):
        return self.now

    def wait(self):
        self.waits.append(self.now)

    def clear(self):
        pass

    def allocated(self):
        return self.held

    def reserved(self):
        return 2 * self.held

    def free(self):
        return self.budget

    def restart_peak(self):
        self.most = self.held

    def peak(self):
        return self.most

    def retries(self):
        return self.tried
