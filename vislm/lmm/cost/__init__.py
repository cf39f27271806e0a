"""What a run costs: FLOPs, bytes and times, expected and measured."""
