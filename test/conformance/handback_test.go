package conformance

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// takeover runs `cri-dockerd takeover` like the node's operator. It returns standard output, then
// standard error, and the exit code.
func (f *foreignNode) takeover(t *testing.T, args ...string) (string, int) {
	t.Helper()
	args = append([]string{
		"takeover",
		"--docker-endpoint=unix://" + f.eng.Socket,
		"--cri-dockerd-root-directory=" + f.newRoot,
		"--run-directory=" + filepath.Join(f.eng.Dir, "run"),
	}, args...)
	cmd := f.eng.Command(f.eng.Program(t), args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("takeover %v: %v", args, err)
	}

	return string(out) + stderr.String(), cmd.ProcessState.ExitCode()
}

// TestTakeoverDryRun inspects a node before our daemon has ever run there, and finds
// inconsistencies.
func TestTakeoverDryRun(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := newForeignNode(t, n)
		all := olderShims(f.newRoot)
		pods := []*foreignPod{f.pod(t, all[0]), f.pod(t, all[1]), f.pod(t, all[2])}
		out, code := f.takeover(t, "--dry-run")
		for i, maker := range []string{"dockershim", "older cri-dockerd", "older cri-dockerd"} {
			p := pods[i]
			line := ""
			for l := range strings.Lines(out) {
				if strings.HasPrefix(l, "default/"+p.config.Metadata.Name+" ") {
					line = l
				}
			}

			for _, want := range []string{maker, "ready", p.ip, fmt.Sprintf("%d->8080/tcp", p.port), "1 running",
				"json-file, linked"} {
				if !strings.Contains(line, want) {
					t.Errorf("%q is missing in %q", want, line)
				}
			}
		}

		if code != 0 || !strings.Contains(out, "3 pods of older shims and 0 of this release") {
			t.Errorf("exit code %d:\n%s", code, out)
		}

		f.docker(t, "rm", "-f", pods[0].sandbox)
		f.docker(t, "rename", pods[1].container, "renamed")
		if err := os.Remove(pods[2].log); err != nil {
			t.Fatal(err)
		}

		var r struct {
			Pods     []struct{ Name, CreatedBy, Sandbox string }
			Findings []struct {
				ActionRequired       bool
				Subject, Detail, Fix string
			}
		}

		out, code = f.takeover(t, "--dry-run", "-o", "json")
		if err := json.NewDecoder(strings.NewReader(out)).Decode(&r); err != nil || code != 3 || len(r.Pods) != 2 {
			t.Errorf("exit code %d, %v:\n%s", code, err, out)
		}

		for want, actionRequired := range map[string]bool{
			pods[0].sandbox + " is the checkpoint of a removed sandbox": false, "its sandbox was removed": false,
			`container name "/renamed" is not of the form`: true,
			pods[2].log + " is not a link":                 true,
		} {
			t.Run(want, func(t *testing.T) {
				found := false
				for _, finding := range r.Findings {
					found = found || strings.Contains(finding.Detail, want) &&
						finding.ActionRequired == actionRequired && finding.Fix != ""
				}
				if !found {
					t.Errorf("finding %q (action required: %t) is missing in\n%s", want, actionRequired, out)
				}
			})
		}

		if held := f.held(t, pods[0]); held == "" {
			t.Error("the dry run has released the network of a pod")
		}
	})
}

// TestHandBack returns a node to an older shim and takes it over again. The test does the work of
// the older shim with CNI and Docker alone.
func TestHandBack(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		f := newForeignNode(t, n)
		theirs := f.pod(t, olderShims(f.newRoot)[2])
		checkpoint := readFile(t, theirs.checkpoint)
		f.daemon(t, "--pod-netns=engine", "--container-log=json-file")
		plain := f.ourPod(t, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.PortMappings = []*runtimeapi.PortMapping{{ContainerPort: 8080, HostPort: 18201}}
		})

		unchanged := func(*runtimeapi.PodSandboxConfig) {}
		stays := f.ourPod(t, unchanged)
		host := f.ourPod(t, func(cfg *runtimeapi.PodSandboxConfig) {
			cfg.Hostname, cfg.Linux.SecurityContext.NamespaceOptions.Network = "", runtimeapi.NamespaceMode_NODE
		})
		f.Kill(t)
		f.daemon(t, "--container-log=json-file")
		own := f.ourPod(t, unchanged)
		before := map[*foreignPod]string{theirs: theirs.pids, stays: stays.pids, host: host.pids, own: own.pids}

		out, code := f.takeover(t, "--hand-back")
		if code != 1 || !strings.Contains(out, "another cri-dockerd is using it") {
			t.Errorf("hand back while the daemon runs: exit code %d, %s", code, out)
		}

		f.Kill(t)
		wantDrain := "default/" + own.config.Metadata.Name + ": its network namespace was created by this daemon"
		if out, code := f.takeover(t, "--hand-back", "--dry-run"); code != 3 || !strings.Contains(out, wantDrain) ||
			!strings.Contains(out, "Would write checkpoints for an older shim: 3 pods") {
			t.Errorf("hand back, dry run: exit code %d, %s", code, out)
		}

		if _, err := os.Stat(plain.checkpoint); !errors.Is(err, fs.ErrNotExist) {
			t.Error("the dry run has written a checkpoint")
		}

		if out, code := f.takeover(t, "--hand-back"); code != 3 || !strings.Contains(out, wantDrain) ||
			!strings.Contains(out, "18201->8080/tcp") {
			t.Errorf("hand back: exit code %d, %s", code, out)
		}

		assertCheckpoints(t, map[*foreignPod]string{
			theirs: checkpoint,
			host:   checkpointOf(host, `{"host_network":true}`),
			plain: checkpointOf(plain, `{"port_mappings":[{"protocol":"tcp","container_port":8080,`+
				`"host_port":18201,"host_ip":""}]}`),
		})

		if _, err := os.Stat(own.checkpoint); !errors.Is(err, fs.ErrNotExist) {
			t.Error("a checkpoint exists for a pod that must be drained; the older shim would adopt the pod")
		}

		if pins := f.run(t, "ls", f.pins()); !strings.Contains(pins, own.sandbox) ||
			strings.Contains(pins, plain.sandbox) || strings.Contains(pins, theirs.sandbox) {
			t.Errorf("pinned namespaces: %s", pins)
		}

		f.removeAsOlderShim(t, plain)
		next := f.pod(t, olderShims(f.newRoot)[2])
		before[next] = next.pids
		f.daemon(t, "--container-log=json-file")
		f.assertUnchanged(t, before)
		eventually(t, "second adoption of the pods", func() bool {
			return strings.Contains(f.run(t, "ls", f.pins()), stays.sandbox)
		})
		for p := range before {
			f.stopPod(t, p.sandbox)
			f.removePod(t, p.sandbox)
			if held := f.held(t, p); held != "" {
				t.Errorf("removed pod %s holds %s", p.config.Metadata.Name, held)
			}
		}

		if held := f.held(t, plain); held != "" {
			t.Errorf("pod removed by the older shim holds %s", held)
		}
	})
}

// checkpointOf returns the checkpoint of a pod with the given data.
func checkpointOf(p *foreignPod, data string) string {
	return fmt.Sprintf(`{"version":"v1","name":%q,"namespace":"default","data":%s,"checksum":0}`,
		p.config.Metadata.Name, data)
}

// assertCheckpoints compares the checkpoints of pods.
func assertCheckpoints(t *testing.T, want map[*foreignPod]string) {
	t.Helper()
	for p, text := range want {
		if got := readFile(t, p.checkpoint); got != text {
			t.Errorf("%s: %s, want %s", p.checkpoint, got, text)
		}
	}
}

// assertUnchanged checks that pods have the given processes, are ready with their address, and
// work.
func (f *foreignNode) assertUnchanged(t *testing.T, processes map[*foreignPod]string) {
	t.Helper()
	for p, pids := range processes {
		if got := f.processes(t, p); got != pids {
			t.Errorf("%s: processes before the hand back:\n%s\nafter the second takeover:\n%s",
				p.config.Metadata.Name, pids, got)
		}

		if s := f.podStatus(t, p.sandbox); s.State != runtimeapi.PodSandboxState_SANDBOX_READY ||
			s.Network.GetIp() != p.ip {
			t.Errorf("after the second takeover: %v, want address %s", s, p.ip)
		}

		f.exec(t, p.container, "true")
	}
}

func readFile(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Error(err)
	}
	return string(b)
}

// ourPod runs a pod through our daemon and describes it as a foreignPod.
func (f *foreignNode) ourPod(t *testing.T, edit func(*runtimeapi.PodSandboxConfig)) *foreignPod {
	t.Helper()
	p := &foreignPod{config: f.podConfig(t), port: 18201}
	edit(p.config)
	r, err := f.Runtime.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: p.config})
	if err != nil {
		t.Fatal(err)
	}

	p.sandbox = r.PodSandboxId
	p.container = f.start(t, p.sandbox, p.config, sh("sleep 1000"))
	p.ip = f.podStatus(t, p.sandbox).Network.GetIp()
	p.pids = f.processes(t, p)
	p.checkpoint = filepath.Join(f.newRoot, "sandbox", p.sandbox)

	return p
}

// removeAsOlderShim removes a pod with the means of an older shim: Docker, the checkpoint, the CNI
// cache, interface eth0.
func (f *foreignNode) removeAsOlderShim(t *testing.T, p *foreignPod) {
	t.Helper()
	var checkpoint struct {
		Data struct {
			PortMappings []struct {
				Protocol      string `json:"protocol"`
				ContainerPort int    `json:"container_port"`
				HostPort      int    `json:"host_port"`
				HostIP        string `json:"host_ip"`
			} `json:"port_mappings"`
		}
	}

	if err := json.Unmarshal([]byte(readFile(t, p.checkpoint)), &checkpoint); err != nil {
		t.Fatal(err)
	}

	var ports []map[string]any
	for _, m := range checkpoint.Data.PortMappings {
		ports = append(ports, map[string]any{
			"protocol":      m.Protocol,
			"containerPort": m.ContainerPort,
			"hostPort":      m.HostPort,
			"hostIP":        m.HostIP,
		})
	}

	if !strings.Contains(f.held(t, p), "rules") {
		t.Error("the pod has no rules for its host port")
	}

	rt := &libcni.RuntimeConf{
		ContainerID:    p.sandbox,
		NetNS:          fmt.Sprintf("/proc/%d/ns/net", f.inspect(t, p.sandbox).State.Pid),
		IfName:         "eth0",
		CapabilityArgs: map[string]any{"portMappings": ports},
	}
	if err := f.cni.DelNetworkList(t.Context(), f.list, rt); err != nil {
		t.Fatal(err)
	}

	f.docker(t, "rm", "-f", p.sandbox, p.container)
	if err := os.Remove(p.checkpoint); err != nil {
		t.Fatal(err)
	}
}
