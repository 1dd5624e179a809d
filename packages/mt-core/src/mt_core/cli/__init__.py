"""What the commands of all packages share: groups of plugins' commands, options, completion (extra `[cli]`)."""
