"""What a run tells others (heartbeat, Prometheus text, alerts, slow ranks, its data), and the list of runs."""
