"""The loss of each level of distillation: pure functions of tensors."""
