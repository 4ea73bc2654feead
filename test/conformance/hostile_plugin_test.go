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

// hostileScript is a plugin before the bridge in a chain. The file "mode" beside it has the
// commands of its ADD; what it starts and leaves running notes its number in "child".
const hostileScript = `#!/bin/sh
cd DIR
cat > /dev/null
[ "$CNI_COMMAND" = ADD ] || exit 0
. ./mode
`

const modest = `echo '{"cniVersion":"1.0.0"}'`

// hostilePlugin puts the plugin and its configuration in place.
func hostilePlugin(t *testing.T, c *cniNode) {
	t.Helper()
	script := strings.ReplaceAll(hostileScript, "DIR", c.bin)
	engines.WriteProgram(t, filepath.Join(c.bin, "hostile"), script)
	hostileMode(t, c, modest)
	c.configure(t, `{"cniVersion":"1.0.0","name":"hostile","plugins":[{"type":"hostile"},{"type":"bridge","bridge":"hostile0","isGateway":true,
		"ipam":{"type":"host-local","ranges":[[{"subnet":"10.79.0.0/24"}]],"routes":[{"dst":"0.0.0.0/0"}]}}]}`)
}

func hostileMode(t *testing.T, c *cniNode, commands string) {
	t.Helper()
	_ = os.Remove(filepath.Join(c.bin, "child"))
	if err := os.WriteFile(filepath.Join(c.bin, "mode"), []byte(commands+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestHostilePlugin runs pods with a plugin that answers with anything, too much, or never: the pod
// fails with a short error that says why, nothing of it is left, the pods that run go on, and the
// daemon does not grow.
func TestHostilePlugin(t *testing.T) {
	eachEngine(t, func(t *testing.T, n *node) {
		c := newCNINode(t, n)
		hostilePlugin(t, c)
		cfg := c.podConfig(t)
		id := c.runPod(t, cfg)
		c.answer(t, id, "alive", 80)
		addr := c.podStatus(t, id).Network.GetIp() + ":80"
		refuse(t, c, "exit 1") // the first failure takes what each needs
		before := c.RSS(t)

		for name, m := range map[string]struct{ commands, want string }{
			"garbage":            {`printf '\377\376\033[2J garbage'`, "its output is not JSON"},
			"100 MiB":            {"head -c 104857600 /dev/zero", "printed more than 1048576 bytes and was killed"},
			"output without end": {"yes & echo $! > child; wait", "printed more than 1048576 bytes and was killed"},
			"100 MiB of errors":  {"head -c 104857600 /dev/zero >&2; exit 3", "exit status 3"},
			"a hostile error": {`printf '{"code":7,"msg":"\377\\u001b[2J'; head -c 900000 /dev/zero | tr '\0' ` +
				`x; printf '"}'; exit 1`, "CNI error 7"},
			"a null interface": {`echo '{"cniVersion":"0.4.0","interfaces":[null],"ips":[{"version":"4",` +
				`"address":"10.1.2.3/24"}]}'`, "interfaces[0]"},
			"a hostile interface": {`echo '{"cniVersion":"1.0.0","interfaces":[{"name":"../../x"}]}'`,
				"is no name of an interface"},
			"an address of nobody": {`echo '{"cniVersion":"1.0.0","ips":[{"address":"0.0.0.0/0"}]}'`,
				"cannot be a pod's"},
			"a multicast address": {`echo '{"cniVersion":"1.0.0","ips":[{"address":"224.0.0.1/24"}]}'`,
				"cannot be a pod's"},
			"an index of nothing": {`echo '{"cniVersion":"1.0.0","ips":[{"interface":-1,"address":"10.1.2.3/24"}]}'`,
				"is not an index"},
		} {
			t.Run(name, func(t *testing.T) {
				err := refuse(t, c, m.commands)
				if !strings.Contains(err.Error(), m.want) {
					t.Errorf("%.500v, want %q", err, m.want)
				}
				c.asked(t, c.own(t).NetNS(""), "tcp", addr, "alive")
			})
		}

		t.Run("no end", func(t *testing.T) { hangs(t, c) })
		t.Run("a child that holds its output", func(t *testing.T) { holdsOutput(t, c) })
		if grown := c.RSS(t) - before; grown > 24<<20 {
			t.Errorf("the daemon has grown by %d MiB", grown>>20)
		}

		c.asked(t, c.own(t).NetNS(""), "tcp", addr, "alive")
		t.Run("files", func(t *testing.T) { hostileFiles(t, c, cfg, id) })
	})
}

// refuse runs a pod that its plugin must fail, and returns the error.
func refuse(t *testing.T, c *cniNode, commands string) error {
	t.Helper()
	hostileMode(t, c, commands)
	cfg := c.podConfig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()

	_, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err == nil {
		t.Fatal("the pod runs")
	}

	if s := err.Error(); ctx.Err() != nil || len(s) > 5000 || !utf8.ValidString(s) || strings.ContainsRune(s, '\x1b') {
		t.Errorf("an error of %d bytes (%v): %.300q", len(s), ctx.Err(), s)
	}
	if !within(5*time.Second, func() bool { return !childRuns(c) }) {
		t.Error("what the plugin started is left")
	}

	c.assertNothingLeft(t, cfg)

	return err
}

// childRuns says whether what the plugin started runs.
func childRuns(c *cniNode) bool {
	return c.eng.Command("sh", "-c", "kill -0 $(cat "+c.bin+"/child)").Run() == nil
}

// hangs is a plugin that never answers: it is killed with what it started when the kubelet gives
// up.
func hangs(t *testing.T, c *cniNode) {
	hostileMode(t, c, "sleep 1000 & echo $! > child; wait")
	cfg := c.podConfig(t)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()

	if _, err := c.Runtime.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: cfg}); err == nil {
		t.Fatal("the pod runs")
	}

	if !within(10*time.Second, func() bool { return !childRuns(c) }) {
		t.Error("what the plugin started is left")
	}

	hostileMode(t, c, modest)
	c.assertNothingLeft(t, cfg)
}

// holdsOutput is a plugin that leaves a process with its output open, which is not waited for.
func holdsOutput(t *testing.T, c *cniNode) {
	hostileMode(t, c, "sleep 1000 & echo $! > child; "+modest)
	cfg := c.podConfig(t)
	began := time.Now()
	id := c.runPod(t, cfg)
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("RunPodSandbox took %v", took)
	}

	c.run(t, "sh", "-c", "kill -9 $(cat "+c.bin+"/child)")
	c.removePod(t, id)
	c.assertNothingLeft(t, cfg)
}

// hostileFiles plants files in libcni's cache, the journal and the configurations, and tears the
// entry of a pod that runs, while the daemon is killed: it starts, says so, and releases the pod's
// address.
func hostileFiles(t *testing.T, c *cniNode, cfg *runtimeapi.PodSandboxConfig, id string) {
	hostileMode(t, c, modest)
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
	c.soon(t, "NetworkReady", func() bool { return c.network(t).Status })
	message := c.network(t).Message
	for _, want := range []string{"00.conf is not valid", "files of the CNI cache could not be used"} {
		if !strings.Contains(message, want) {
			t.Errorf("condition %q, want %q", message, want)
		}
	}

	if got := c.podStatus(t, id).Network.GetIp(); got != address {
		t.Errorf("the running pod's address was %s, now it is %q", address, got)
	}

	other := c.podConfig(t)
	second := c.runPod(t, other)
	c.removePod(t, second)
	c.removePod(t, id)
	c.assertNothingLeft(t, cfg)
	c.assertNothingLeft(t, other)
	if leases, _ := filepath.Glob(filepath.Join(c.LeaseDir, "hostile/10.79.0.*")); len(leases) > 0 {
		t.Errorf("addresses are left: %v", leases)
	}
	if left, _ := os.ReadDir(results); len(left) > 0 {
		t.Errorf("left to be read: %v", left)
	}
}
