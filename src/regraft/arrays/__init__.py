"""The arrays reader: carry out a plan, or one equation, on tensors in memory."""
