"""The methods: what each one trains, minimises and publishes."""
