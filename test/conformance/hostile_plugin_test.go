package conformance

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// hostileScript is a plugin before the bridge in a chain. The file "mode" has the commands of its
// ADD. A child left behind by them writes its PID to "child".
const hostileScript = `#!/bin/sh
cd DIR
cat > /dev/null
[ "$CNI_COMMAND" = ADD ] || exit 0
. ./mode
`

const emptyResult = `echo '{"cniVersion":"1.0.0"}'`

// hostilePlugin installs the plugin and its configuration.
func hostilePlugin(t *testing.T, c *cniNode) {
	t.Helper()
	script := strings.ReplaceAll(hostileScript, "DIR", c.bin)
	engines.WriteProgram(t, filepath.Join(c.bin, "hostile"), script)
	hostileMode(t, c, emptyResult)
	c.configure(t, `{"cniVersion":"1.0.0","name":"hostile","plugins":[{"type":"hostile"},
		{"type":"bridge","bridge":"hostile0","isGateway":true,
		"ipam":{"type":"host-local","ranges":[[{"subnet":"10.79.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`)
}

func hostileMode(t *testing.T, c *cniNode, commands string) {
	t.Helper()
	_ = os.Remove(filepath.Join(c.bin, "child"))
	if err := os.WriteFile(filepath.Join(c.bin, "mode"), []byte(commands+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestHostilePlugin runs pods with a plugin that prints garbage or too much, or never responds. The
// pod fails with a short error that names the cause, and nothing of it remains. Running pods
// continue, and the memory of the daemon does not grow.
func TestHostilePlugin(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := newCNINode(t, n)
		hostilePlugin(t, c)
		cfg := c.podConfig(t)
		id := c.runPod(t, cfg)
		c.serveWord(t, id, "alive", 80)
		addr := c.podStatus(t, id).Network.GetIp() + ":80"
		runFailingPod(t, c, "exit 1") // the first failure allocates memory shared by all
		before := c.Heap(t)

		for name, m := range map[string]struct{ commands, want string }{
			"garbage": {
				commands: `printf '\377\376\033[2J garbage'`,
				want:     "output is not JSON",
			},
			"100 MiB": {
				commands: "head -c 104857600 /dev/zero",
				want:     "killed after printing more than 1048576 bytes",
			},
			"endless output": {
				commands: "yes & echo $! > child; wait",
				want:     "killed after printing more than 1048576 bytes",
			},
			"100 MiB of errors": {
				commands: "head -c 104857600 /dev/zero >&2; exit 3",
				want:     "exit status 3",
			},
			"hostile error": {
				commands: `printf '{"code":7,"msg":"\377\\u001b[2J'; ` +
					`head -c 900000 /dev/zero | tr '\0' x; printf '"}'; exit 1`,
				want: "CNI error 7",
			},
			"null interface": {
				commands: `echo '{"cniVersion":"0.4.0","interfaces":[null],` +
					`"ips":[{"version":"4","address":"10.1.2.3/24"}]}'`,
				want: "interfaces[0]",
			},
			"hostile interface": {
				commands: `echo '{"cniVersion":"1.0.0","interfaces":[{"name":"../../x"}]}'`,
				want:     "is not a valid interface name",
			},
			"unspecified address": {
				commands: `echo '{"cniVersion":"1.0.0","ips":[{"address":"0.0.0.0/0"}]}'`,
				want:     "is not a valid pod address",
			},
			"multicast address": {
				commands: `echo '{"cniVersion":"1.0.0","ips":[{"address":"224.0.0.1/24"}]}'`,
				want:     "is not a valid pod address",
			},
			"invalid index": {
				commands: `echo '{"cniVersion":"1.0.0","ips":[{"interface":-1,"address":"10.1.2.3/24"}]}'`,
				want:     "is not an index",
			},
		} {
			t.Run(name, func(t *testing.T) {
				err := runFailingPod(t, c, m.commands)
				if !strings.Contains(err.Error(), m.want) {
					t.Errorf("RunPodSandbox: %.500v, want %q", err, m.want)
				}
				c.assertServed(t, c.own(t).NetNS(""), "tcp", addr, "alive")
			})
		}

		t.Run("no response", func(t *testing.T) { hangingPlugin(t, c) })
		t.Run("child with open output", func(t *testing.T) { openOutput(t, c) })
		t.Logf("%d KiB before, %d KiB after", before>>10, c.Heap(t)>>10)
		if grown := c.Heap(t) - before; grown > 1<<20 { // one output of a plugin, at most
			t.Errorf("objects of the daemon have grown by %d KiB", grown>>10)
		}

		c.assertServed(t, c.own(t).NetNS(""), "tcp", addr, "alive")
		t.Run("files", func(t *testing.T) { hostileFiles(t, c, cfg, id) })
	})
}

// runFailingPod runs a pod with failing plugin commands and returns the error.
func runFailingPod(t *testing.T, c *cniNode, commands string) error {
	t.Helper()
	hostileMode(t, c, commands)
	cfg := c.podConfig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	_, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err == nil {
		t.Fatal("RunPodSandbox succeeded")
	}

	if s := err.Error(); ctx.Err() != nil || len(s) > 5000 || !utf8.ValidString(s) || strings.ContainsRune(s, '\x1b') {
		t.Errorf("want a short printable error, got %d bytes (%v): %.300q", len(s), ctx.Err(), s)
	}
	if !within(5*time.Second, func() bool { return !isChildRunning(c) }) {
		t.Error("the child of the plugin still runs")
	}

	c.assertNoLeftovers(t, cfg)

	return err
}

// isChildRunning reports whether the plugin's child runs.
func isChildRunning(c *cniNode) bool {
	return c.eng.Command("sh", "-c", "kill -0 $(cat "+c.bin+"/child)").Run() == nil
}

// hangingPlugin never responds. It is killed with its child after the kubelet's deadline.
func hangingPlugin(t *testing.T, c *cniNode) {
	hostileMode(t, c, "sleep 1000 & echo $! > child; wait")
	cfg := c.podConfig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()

	if _, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}); err == nil {
		t.Fatal("RunPodSandbox succeeded")
	}

	if !within(10*time.Second, func() bool { return !isChildRunning(c) }) {
		t.Error("the child of the plugin still runs")
	}

	hostileMode(t, c, emptyResult)
	c.assertNoLeftovers(t, cfg)
}

// openOutput is a plugin with a child that holds its output open. The daemon does not wait for the
// child.
func openOutput(t *testing.T, c *cniNode) {
	hostileMode(t, c, "sleep 1000 & echo $! > child; "+emptyResult)
	cfg := c.podConfig(t)
	began := time.Now()
	id := c.runPod(t, cfg)
	if took := time.Since(began); took > scaled(10*time.Second) {
		t.Errorf("RunPodSandbox took %v", took)
	}

	c.run(t, "sh", "-c", "kill -9 $(cat "+c.bin+"/child)")
	c.removePod(t, id)
	c.assertNoLeftovers(t, cfg)
}

// hostileFiles kills the daemon, creates unusable files in libcni's cache, the journal and the
// configurations, and truncates the cache entry of a running pod. The daemon starts, reports the
// files, and releases the pod's address later.
func hostileFiles(t *testing.T, c *cniNode, cfg *runtimeapi.PodSandboxConfig, id string) {
	hostileMode(t, c, emptyResult)
	address := c.podStatus(t, id).Network.GetIp()
	c.Kill(t)
	results := filepath.Dir(c.CacheDir) + "/results"
	huge := filepath.Join(results, "huge")
	if err := errors.Join(
		os.Truncate(filepath.Join(results, "hostile-"+id+"-eth0"), 50),
		unix.Mkfifo(filepath.Join(results, "fifo"), 0o600),
		os.WriteFile(huge, nil, 0o600), os.Truncate(huge, 1<<40),
		unix.Mkfifo(filepath.Join(c.PendingDir, strings.Repeat("f", 64)), 0o600),
		unix.Mkfifo(filepath.Join(c.conf, "00.conf"), 0o600),
	); err != nil {
		t.Fatal(err)
	}

	c.Restart(t)
	c.awaitPromptly(t, "NetworkReady", func() bool { return c.networkCondition(t).Status })
	message := c.networkCondition(t).Message
	for _, want := range []string{"00.conf is invalid", "unusable files of the CNI cache"} {
		if !strings.Contains(message, want) {
			t.Errorf("condition NetworkReady %q, want %q", message, want)
		}
	}

	if got := c.podStatus(t, id).Network.GetIp(); got != address {
		t.Errorf("the running pod's address changed from %s to %q", address, got)
	}

	other := c.podConfig(t)
	second := c.runPod(t, other)
	c.removePod(t, second)
	c.removePod(t, id)
	c.assertNoLeftovers(t, cfg)
	c.assertNoLeftovers(t, other)
	if leases, _ := filepath.Glob(filepath.Join(c.LeaseDir, "hostile/10.79.0.*")); len(leases) > 0 {
		t.Errorf("addresses remain: %v", leases)
	}
	if files, _ := os.ReadDir(results); len(files) > 0 {
		t.Errorf("cache files remain: %v", files)
	}
}
