"""What `lamda prove-gpu` measures on a GPU machine, in parts that each run in a process of their own."""
