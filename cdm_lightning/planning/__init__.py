"""Before a training, `cdm plan`: its FLOPs, memory and time. Over many trainings, `cdm sweep`."""
