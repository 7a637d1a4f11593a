"""The quickstart: pretrain and register a small language model that the main job can merge."""
