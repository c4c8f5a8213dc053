"""Training from preferences (DPO, KTO, ORPO, CPO, SimPO): configuration, data, trainers, and `preference`."""
