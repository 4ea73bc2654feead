package finding

import (
	"cri-dockerd/internal/shell"
)

// checkNRIFiles checks files with which the daemon does not start.
func checkNRIFiles(f *Facts) result {
	switch {
	case len(f.NRI.Misnamed) > 0:
		return fail(shell.Command("chmod a-x {}", f.NRI.Misnamed[0]).
			Note("or rename it to NN-name, as in 10-logger, and restart the daemon"),
			"%s is a plugin of --nri-plugin-dir without an index in its name: the daemon does not start",
			f.NRI.Misnamed[0])
	case f.NRI.Validator != "":
		return fail(shell.Advice("correct the file of --nri-validator-config (docs/nri.md#rules-for-plugins)"),
			"--nri-validator-config: %s: the daemon does not start", f.NRI.Validator)
	case f.NRI.BlockIO != "":
		return fail(shell.Advice("correct the file of --nri-blockio-config (docs/nri.md#classes-of-block-io)"),
			"--nri-blockio-config: %s: the daemon does not start", f.NRI.BlockIO)
	}
	return ok("valid or unused")
}

// checkNRIPlugins lists the plugins. The daemon reports the condition only if NRI is on.
func checkNRIPlugins(f *Facts) result {
	c, known := f.condition("NRIPlugins")
	switch {
	case !known:
		return ok("NRI is off")
	case c.Status:
		return ok("%s", c.Message)
	case c.Reason == "Starting":
		return skip("%s", c.Message)
	case c.Reason == "NoPlugin":
		return warn(shell.Advice("start the plugins, or remove --nri-socket (docs/nri.md)"), "%s", c.Message)
	}

	return warn(shell.Advice("read the logs of the plugin and restart it"), "%s", c.Message)
}
