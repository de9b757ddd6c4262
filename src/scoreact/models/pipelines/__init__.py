"""Diffusers pipelines as models. diffusers, transformers and peft are imported here alone, when one is opened."""
