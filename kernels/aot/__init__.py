"""Every kernel compiled ahead of time, without a GPU: what is compiled, how, and what the machine code looks like."""
