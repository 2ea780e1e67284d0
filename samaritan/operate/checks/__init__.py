"""What `samaritan doctor` looks at: files, certificates, clock, network, ports and users."""
