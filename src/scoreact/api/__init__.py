"""The front door of the library: `finetune`, what it returns, and runs opened again. The command line uses the same."""
