"""Files that know no adapter. A reader of the method can leave all of them closed.

checkpoint   a model as the Hub stores it
tokenizer    text to token ids and back, on tiktoken
bpe          byte-pair encodings of model files, as ranks of tiktoken
rows         files of rows, in many forms
data         tasks, prompts, batches
downloads    where a data set comes from
hub          downloads from the Hub, and why one failed
answer_loss  the loss of given answers
ranks        several processes (FSDP2)
device       what CUDA is told, and what memory is free
memory       what a run takes, by its shapes
base_model   which model a run is on
run_folder   a run's folder, its lock, its results
saves        what a run resumes from
files        files that are whole or absent
flags        the flags of the six commands
cli          how a command starts and ends, and its progress
quiet        signals and progress bars, before torch is imported
"""
