"""What knows no adapter: a reader of the method can leave all of this closed.

ranks        one process or several (FSDP2): who does what, and how parts come together
checkpoint   a model as the Hub stores it: config.json, tensor names, safetensors
tokenizer    text to token ids and back, on tiktoken
downloads    where a data set comes from, and whether it is the right one
data         tasks, prompts, and the batch of step n
answer_loss  how likely the given answers of a task are to a model
files        files that are either whole or absent; JSON that is checked when it is read
base_model   which model a run was trained on, and whether it has changed
run_folder   a run's folder: its lock, run.json, metrics, results
saves        what a stopped run resumes from
cli          how a command starts, ends, and reads its flags
"""
