"""Fine-tunes a model in 8 bits with LoRA: texts to documents to rows of tokens to an adapter.

| module | what |
|---|---|
| `texts` | files, folders and datasets as documents, and which of them are held out |
| `packing` | documents as rows of tokens that do not see each other |
| `settings` | what a run is told, with its defaults |
| `folder` | the run's folder: what it holds, whether a run may go on in it |
| `device` | what suits a device: dtype, rows at once, activations kept or computed again |
| `listener` | who is told how it goes |
| `trainer` | Transformers' Trainer with checkpoints that are whole or not there |
| `samples` | what the model writes before and after |
| `plot` | the curves |
| `report` | how the run went |
| `run` | `finetune`, all of it in order |
"""
