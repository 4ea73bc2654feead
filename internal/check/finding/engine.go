package finding

import (
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

func engineRules() []rule {
	engine := []string{"engine"}
	return []rule{
		{"engine-config", "Docker daemon.json", nil, checkEngineConfig},
		{"engine", "Docker responds", []string{"engine-config"}, checkEngine},
		{"engine-version", "Docker version", engine, checkEngineVersion},
		{"storage-driver", "Docker storage driver", engine, checkStorage},
		{"engine-log-driver", "Docker log driver", engine, checkEngineLog},
		{"live-restore", "containers keep running while Docker restarts", engine, checkLiveRestore},
		{"user-namespaces", "user namespaces", engine, checkUsers},
		{"pause-image", "sandbox image", engine, checkPause},
		{"cap-sys-resource", "the OOM score of containers can be lowered", engine, checkOOM},
	}
}

func checkEngineConfig(f *Facts) result {
	c := f.Engine.Config
	fix := shell.Advice("correct {} (dockerd --validate --config-file {} shows the error)", c.File, c.File)
	u, untrusted := f.untrusted(c.File)
	switch {
	case untrusted:
		return fail(u.fix(), "%s is not trusted because users other than root can change it: %s", c.File, u.Reason)
	case c.Error != "" && f.Engine.Problem != "":
		return fail(fix, "%s: %s; Docker cannot start", c.File, c.Error)
	case c.Error != "" && f.Root:
		return warn(fix, "%s: %s; Docker cannot restart", c.File, c.Error)
	case c.Text == "":
		return ok("no file, defaults apply")
	}

	return ok("%s", c.File)
}

func checkEngine(f *Facts) result {
	e, at := f.Engine, f.Flags.Docker
	switch e.Problem {
	case "", TooOld:
		if e.Slow > 0 && e.Problem == "" {
			return f.slow("Docker "+e.Version+" at "+at, e.Slow)
		}
		return ok("Docker %s at %s", e.Version, at)
	case NotRoot:
		return fail(shell.Advice("stop the process listening on {}, then start Docker", at),
			"the Docker socket is not trusted: %s", e.Error)
	case Denied:
		return fail(shell.Command("sudo usermod -aG docker $(id -un) && newgrp docker"),
			"permission denied on %s: the user is not a member of the group docker", at)
	case Missing, Refused:
		if !e.Installed {
			return fail(f.startEngine("start"), "Docker Engine is not installed: nothing listens on %s", at)
		}
		return fail(f.startEngine("start"), "Docker is not running: nothing listens on %s", at)

	case Silent:
		return f.silent("Docker at "+at, e.Slow, e.Stopped, f.restartEngine())
	case TLS:
		return fail(shell.Advice("set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH (ca.pem, cert.pem, key.pem), and "+
			"--docker-endpoint= (empty) for the daemon"),
			"TLS handshake with %s failed: %s", at, e.Error)
	}

	return fail(shell.Advice("read Docker's log (journalctl -u docker -n 50) and resolve the reason"),
		"Docker at %s: %s", at, e.Error)
}

// restartEngine returns the line to restart a hung Docker.
func (f *Facts) restartEngine() shell.Line {
	line := f.startEngine("restart")
	if enabled, _ := f.Engine.Config.Keys["live-restore"].(bool); !enabled {
		return line.Note("stops all pods of this node, because live-restore is disabled")
	}
	return line
}

// newestEngine is the newest major version of Docker Engine in the daemon's tests.
const newestEngine = 29

func checkEngineVersion(f *Facts) result {
	e := f.Engine
	if e.Problem == TooOld {
		return fail(f.upgradeEngine(),
			"Docker %s (API %s) is not supported: version 20.10 (API 1.41) or newer is required", e.Version, e.API)
	}

	if e.Problem != "" {
		return skip("unknown")
	}

	major, _, _ := strings.Cut(e.Version, ".")
	if n, err := strconv.Atoi(major); err == nil && n > newestEngine {
		return warn(shell.Advice("no action is required while pods run; otherwise install Docker Engine {}",
			strconv.Itoa(newestEngine)),
			"Docker %s is newer than the tested versions (20.10 to %d)", e.Version, newestEngine)
	}

	return ok("%s, API %s", e.Version, e.API)
}

func (f *Facts) upgradeEngine() shell.Line {
	if f.Debian {
		return shell.Command("apt-get update && apt-get install -y --only-upgrade $(dpkg -S $(command -v dockerd) | " +
			"cut -d: -f1)")
	}
	return shell.Advice("upgrade Docker Engine to 20.10 or newer: https://docs.docker.com/engine/install/")
}

func checkStorage(f *Facts) result {
	e := f.Engine
	switch e.StorageDriver {
	case "":
		return skip("unknown")
	case "vfs", "devicemapper", "aufs", "overlay":
		if !f.Node.Overlay {
			fix := shell.Command("modprobe overlay && echo overlay >> /etc/modules-load.d/kubernetes.conf")
			if e.Installed { // otherwise the engine runs elsewhere
				fix = fix.And(f.startEngine("restart"))
			}
			return warn(fix,
				"storage driver %s is slow and uses more disk space; the kernel has no overlayfs", e.StorageDriver)
		}
		return warn(f.setDaemonJSON("storage-driver", `"overlay2"`, "restart"),
			"storage driver %s is slow or no longer supported; switching to overlay2 requires pulling images again",
			e.StorageDriver)
	}

	return ok("%s", e.StorageDriver)
}

// checkEngineLog checks Docker's default log driver. Pods have a log driver of their own, but
// Docker adds its default options if both are json-file.
func checkEngineLog(f *Facts) result {
	e := f.Engine
	if e.Problem != "" {
		return skip("unknown")
	}

	opts, _ := e.Config.Keys["log-opts"].(map[string]any)
	if _, rotates := opts["max-size"]; rotates && e.LogDriver == "json-file" && f.jsonFile() {
		return warn(shell.Advice("remove max-size and max-file from log-opts in {}; the kubelet rotates logs "+
			"(containerLogMaxSize)", e.Config.File),
			"json-file with max-size: Docker and the kubelet both rotate container logs, and kubectl logs misses lines")
	}

	return ok("%s; not used for pods", e.LogDriver)
}

// jsonFile reports whether pods use Docker's json-file log driver.
func (f *Facts) jsonFile() bool {
	if f.Flags.ContainerLog == "json-file" {
		return true
	}
	c, known := f.condition("ContainerLogs")
	return known && c.Reason == "JSONFile"
}

func checkLiveRestore(f *Facts) result {
	if f.Engine.Problem != "" {
		return skip("unknown")
	}

	if !f.Engine.LiveRestore {
		return warn(f.setDaemonJSON("live-restore", "true", "reload"),
			"live-restore is disabled: a restart or upgrade of Docker stops all pods on this node")
	}

	return ok("live-restore is enabled")
}

// checkUsers warns about the restrictions of an engine with userns-remap.
func checkUsers(f *Facts) result {
	switch {
	case f.Engine.Problem != "":
		return skip("unknown")
	case f.Engine.MapsUsers:
		return warn(shell.Advice("no action is required if the pods of this node support it (docs/check.md)"),
			"userns-remap is enabled: privileged pods and pods with hostNetwork, hostPID or hostIPC run without it; "+
				"for all other pods, files of the node's users belong to nobody")
	}

	return ok("userns-remap is disabled")
}

func checkPause(f *Facts) result {
	image := f.Flags.PauseImage
	switch {
	case image == "":
		return ok("embedded, no registry required")
	case f.Engine.Problem != "":
		return skip("unknown")
	case f.Engine.PauseImage == "":
		return ok("%s is present", image)
	case f.Engine.PausePullable:
		return warn(shell.Command("docker pull {}", image),
			"image %s is not present; the first pod has to wait for the pull", image)
	}

	fix := shell.Advice("remove --pod-infra-container-image: the embedded image requires no registry")
	if file := f.Flags.Files["pod-infra-container-image"]; file != "" && f.Systemd {
		fix = dropFlags([]string{file}, "pod-infra-container-image").
			And(shell.Command("systemctl daemon-reload && systemctl restart {}", f.daemonUnit()))
	}

	return fail(fix, "image %s is not present and cannot be pulled: %s", image, f.Engine.PauseImage)
}
