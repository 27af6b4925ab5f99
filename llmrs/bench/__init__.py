"""What `llmrs bench` measures: decode rates, sweeps, workloads, profiles, start-up, beside what the device allows."""
