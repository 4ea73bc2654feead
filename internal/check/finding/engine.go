package finding

import (
	"strconv"
	"strings"

	"cri-dockerd/internal/shell"
)

func engineRules() []rule {
	engine := []string{"engine"}
	return []rule{
		{"engine-config", "Docker's daemon.json", nil, judgeEngineConfig},
		{"engine", "Docker answers", []string{"engine-config"}, judgeEngine},
		{"engine-version", "Docker's version", engine, judgeEngineVersion},
		{"storage-driver", "Docker's storage driver", engine, judgeStorage},
		{"engine-log-driver", "Docker's log driver", engine, judgeEngineLog},
		{"live-restore", "containers outlive Docker", engine, judgeLiveRestore},
		{"user-namespaces", "users of containers", engine, judgeUsers},
		{"pause-image", "sandbox image", engine, judgePause},
		{"cap-sys-resource", "containers can be spared by the OOM killer", engine, judgeOOM},
	}
}

func judgeEngineConfig(f *Facts) verdict {
	c := f.Engine.Config
	fix := shell.Advice("correct {} (dockerd --validate --config-file {} shows the place)", c.File, c.File)
	u, untrusted := f.untrusted(c.File)
	switch {
	case untrusted:
		return fail(u.fix(), "%s is not read, since other users can change it, and with it Docker: %s", c.File,
			u.Reason)
	case c.Error != "" && f.Engine.Problem != "":
		return fail(fix, "%s: %s; Docker does not start with it", c.File, c.Error)
	case c.Error != "" && f.Root:
		return warn(fix, "%s: %s; Docker will not start again with it", c.File, c.Error)
	case c.Text == "":
		return ok("none, the defaults hold")
	}

	return ok("%s", c.File)
}

func judgeEngine(f *Facts) verdict {
	e, at := f.Engine, f.Flags.Docker
	switch e.Problem {
	case "", TooOld:
		return ok("Docker %s at %s", e.Version, at)
	case NotRoot:
		return fail(shell.Advice("stop the process that listens at {}, then start Docker", at),
			"%s; it is not believed", e.Error)
	case Denied:
		return fail(shell.Command("sudo usermod -aG docker $(id -un) && newgrp docker"),
			"permission denied at %s: this user is not in the group docker", at)
	case Missing, Refused:
		if !e.Installed {
			return fail(f.startEngine("start"), "Docker Engine is not installed (nobody listens at %s)", at)
		}
		return fail(f.startEngine("start"), "Docker is not running: nobody listens at %s", at)

	case Silent:
		return fail(f.startEngine("restart"), "Docker does not answer in time at %s: %s", at, e.Error)
	case TLS:
		return fail(shell.Advice("set DOCKER_TLS_VERIFY=1 and DOCKER_CERT_PATH (ca.pem, cert.pem, key.pem), and "+
			"--docker-endpoint= (empty) for the daemon"),
			"TLS at %s: %s", at, e.Error)
	}

	return fail(f.startEngine("restart"), "Docker at %s: %s", at, e.Error)
}

// newestEngine is the newest major version on which the daemon is tested, newestAPI the newest that
// its client speaks.
const newestEngine = 29

func judgeEngineVersion(f *Facts) verdict {
	e := f.Engine
	if e.Problem == TooOld {
		return fail(f.upgradeEngine(), "Docker %s (API %s) is too old: at least 20.10 (API 1.41) is needed", e.Version,
			e.API)
	}

	if e.Problem != "" {
		return skip("not known")
	}

	major, _, _ := strings.Cut(e.Version, ".")
	if n, err := strconv.Atoi(major); err == nil && n > newestEngine {
		return warn(shell.Advice("nothing to do while pods work; otherwise install Docker Engine {}",
			strconv.Itoa(newestEngine)),
			"Docker %s is newer than what this release is tested with (20.10 to %d)", e.Version, newestEngine)
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

func judgeStorage(f *Facts) verdict {
	e := f.Engine
	switch e.StorageDriver {
	case "":
		return skip("not known")
	case "vfs", "devicemapper", "aufs", "overlay":
		if !f.Node.Overlay {
			return warn(shell.Command("modprobe overlay && echo overlay >> /etc/modules-load.d/kubernetes.conf").
				And(f.startEngine("restart")),
				"%s, since the kernel has no overlayfs: images are slow and large", e.StorageDriver)
		}
		return warn(f.setDaemonJSON("storage-driver", `"overlay2"`, "restart"),
			"%s is slow or gone from newer engines; with overlay2 images have to be pulled again", e.StorageDriver)
	}

	return ok("%s", e.StorageDriver)
}

// judgeEngineLog looks at Docker's own log driver: pods are created with one of their own, but
// Docker adds its options when both are json-file.
func judgeEngineLog(f *Facts) verdict {
	e := f.Engine
	if e.Problem != "" {
		return skip("not known")
	}

	opts, _ := e.Config.Keys["log-opts"].(map[string]any)
	if _, rotates := opts["max-size"]; rotates && e.LogDriver == "json-file" && f.jsonFile() {
		return warn(shell.Advice("take max-size and max-file out of log-opts in {}; the kubelet rotates with "+
			"containerLogMaxSize", e.Config.File),
			"json-file with max-size: Docker and the kubelet rotate the same logs of pods, and lines are lost to "+
				"kubectl logs")
	}

	return ok("%s; pods do not use it", e.LogDriver)
}

// jsonFile says whether pods are logged by Docker's json-file.
func (f *Facts) jsonFile() bool {
	if f.Flags.ContainerLog == "json-file" {
		return true
	}
	c, known := f.condition("ContainerLogs")
	return known && c.Reason == "JSONFile"
}

func judgeLiveRestore(f *Facts) verdict {
	if f.Engine.Problem != "" {
		return skip("not known")
	}

	if !f.Engine.LiveRestore {
		return warn(f.setDaemonJSON("live-restore", "true", "reload"),
			"live-restore is off: all pods of this node end whenever Docker restarts or is upgraded")
	}

	return ok("live-restore is on")
}

// judgeUsers says what pods can do on an engine with userns-remap.
func judgeUsers(f *Facts) verdict {
	switch {
	case f.Engine.Problem != "":
		return skip("not known")
	case f.Engine.MapsUsers:
		return warn(shell.Advice("nothing to do if the pods of this node are made for it (docs/check.md)"),
			"userns-remap is on: privileged pods and those with the node's network, PIDs or IPC run without it; "+
				"all others see the files of the node's users as nobody's")
	}

	return ok("the node's own")
}

func judgePause(f *Facts) verdict {
	image := f.Flags.PauseImage
	switch {
	case image == "":
		return ok("embedded, needs no registry")
	case f.Engine.Problem != "":
		return skip("not known")
	case f.Engine.PauseImage == "":
		return ok("%s, is here", image)
	case f.Engine.PausePullable:
		return warn(shell.Command("docker pull {}", image), "%s is not on this node yet; the first pod waits for "+
			"its pull", image)
	}

	fix := shell.Advice("leave --pod-infra-container-image away: the embedded image needs no registry")
	if file := f.Flags.Files["pod-infra-container-image"]; file != "" && f.Systemd {
		fix = dropFlags([]string{file},
			"pod-infra-container-image").And(shell.Command("systemctl daemon-reload && systemctl restart {}",
			f.daemonUnit()))
	}

	return fail(fix, "%s is not on this node, and its registry does not have it or cannot be reached: %s", image,
		f.Engine.PauseImage)
}
