"""The trainer's side of the decision socket."""
