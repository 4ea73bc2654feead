package nodes

import (
	"os"
	"strings"
	"testing"

	"cri-dockerd/test/engines"
)

// TestNodes starts two nodes in one network, one for each cgroup driver. No unit may fail,
// containers must run in the control groups of their node, the host's engine must be invisible, and
// no resources may remain.
func TestNodes(t *testing.T) {
	var removed []string // directories and control groups
	t.Run("nodes", func(t *testing.T) {
		w := NewNetwork(t)
		for _, driver := range []string{"systemd", "cgroupfs"} {
			n := Start(t, Config{Network: w, Driver: driver, Files: map[string]string{"/etc/test": driver}})
			removed = append(removed, n.dir, "/sys/fs/cgroup/memory/"+n.cgroup)
			testNode(t, n, driver)
			if driver == "systemd" {
				testReboot(t, n)
			}
		}

		n := Start(t, Config{Network: w, NoDocker: true})
		removed = append(removed, n.dir)
		if out, err := n.Try("systemctl", "is-active", "docker.service"); strings.TrimSpace(out) != "inactive" {
			t.Errorf("NoDocker: got docker.service %q, %v", out, err)
		}

		for _, to := range []string{"node1", "node2"} {
			n.Run(t, "busybox", "ping", "-c", "1", "-W", "10", to)
		}
	})

	for _, dir := range removed {
		if _, err := os.Stat(dir); !os.IsNotExist(err) {
			t.Errorf("%s remains: %v", dir, err)
		}
	}
}

func testNode(t *testing.T, n *Node, driver string) {
	t.Helper()
	if got := n.Run(t, "systemctl", "is-system-running"); got != "running\n" {
		t.Errorf("systemd: got state %q", got)
	}
	if got := n.Run(t, "cat", "/etc/test"); got != driver {
		t.Errorf("/etc/test: got %q, want %q", got, driver)
	}

	want := n.Name + " " + driver + " 0\n"
	if got := n.Run(t, "docker", "info", "-f", "{{.Name}} {{.CgroupDriver}} {{.Containers}}"); got != want {
		t.Errorf("docker info: got %q, want %q", got, want)
	}

	engines.LoadBusybox(t, n.Path("/run/docker.sock"))
	out := n.Run(t, "docker", "run", "--rm", "--privileged", "--oom-score-adj=-500", engines.Busybox, "sh", "-c",
		"hostname -i; ulimit -n")
	if !strings.HasPrefix(out, "172.17.0.") {
		t.Errorf("docker run: got %q", out)
	}

	n.Run(t, "docker", "run", "-d", "--name=test", engines.Busybox, "sleep", "1000")
	pid := strings.TrimSpace(n.Run(t, "docker", "inspect", "-f", "{{.State.Pid}}", "test"))
	if b, err := os.ReadFile(n.Path("/proc/" + pid + "/cgroup")); err != nil ||
		strings.Count(string(b), ":/"+n.cgroup+"/") != strings.Count(string(b), "\n") {
		t.Errorf("control groups of a container: %v\n%s", err, b)
	}
}

// testReboot reboots and resets a node. Files and images remain, processes and /run do not.
func testReboot(t *testing.T, n *Node) {
	t.Helper()
	for name, reboot := range map[string]func(){
		"reboot": func() { n.Reboot(t, bootTimeout) },
		"reset":  func() { n.Reset(t) },
	} {
		n.WriteFile(t, "/run/marker", name, 0o644)
		n.WriteFile(t, "/etc/marker", name, 0o644)
		started := n.Run(t, "docker", "inspect", "-f", "{{.State.StartedAt}}", "test")
		n.Run(t, "docker", "update", "--restart=always", "test")
		reboot()
		if _, err := os.Stat(n.Path("/run/marker")); !os.IsNotExist(err) {
			t.Errorf("%s: /run/marker remains: %v", name, err)
		}
		if got := n.Run(t, "cat", "/etc/marker"); got != name {
			t.Errorf("%s: /etc/marker: got %q", name, got)
		}

		n.Await(t, bootTimeout, "restart of the container", func() bool {
			out, err := n.Try("docker", "inspect", "-f", "{{.State.StartedAt}}", "test")
			return err == nil && out != started
		})
	}

	n.Disconnect(t)
	if _, err := n.Try("busybox", "ping", "-c", "1", "-W", "1", Gateway); err == nil {
		t.Errorf("%s reaches the network without its connection", n.Name)
	}

	n.Connect(t)
	n.Run(t, "busybox", "ping", "-c", "1", "-W", "10", Gateway)
}
