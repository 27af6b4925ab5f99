"""The measurements of `llmrs bench`: decode rates, sweeps, workloads, profiles and start-up against the roofline."""
