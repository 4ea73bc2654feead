package packages

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
	"cri-dockerd/test/nodes"
)

// limitPods is the number of pods with exhausted kernel limits. make limits uses 110, the kubelet's
// own limit.
var limitPods = flag.Int("limit-pods", 20, "pods of TestKernelLimits")

const (
	limitLines = 20    // printed by each container
	lineSize   = 20000 // bytes without the newline
	starters   = 4     // pods started concurrently
)

// TestKernelLimits runs the packaged units while root's pipe pages and inotify instances are
// exhausted. Every line of 20 kB must arrive, also when the log-driver is killed, the daemon
// restarts, and further pods start.
func TestKernelLimits(t *testing.T) {
	for _, v := range engines.Versions() {
		t.Run(string(v), func(t *testing.T) {
			engines.ExhaustLimits(t)
			exhaustPipePages(t)
			m := startWith(t, v)
			began := time.Now()
			m.startPrinters(t, 0, *limitPods)
			t.Logf("%d pods with a container each started in %v", *limitPods, time.Since(began).Round(time.Second))

			free := exhaustInotify(t)
			m.Run(t, "systemctl", "kill", "-s", "KILL", "--kill-who=main", "cri-docker-log.service")
			before := m.property(t, "cri-docker.service", "MainPID")
			m.Run(t, "systemctl", "restart", "cri-docker.service")
			m.awaitActive(t, "cri-docker.service", "cri-docker-log.service")
			if after := m.property(t, "cri-docker.service", "MainPID"); after == before {
				t.Errorf("the daemon's PID was %s and is %s", before, after)
			}

			const further = 3
			m.startPrinters(t, *limitPods, further)
			m.awaitMessage(t, "NetworkReady", "fs.inotify.max_user_instances")
			free()
			m.checkPipeShortage(t)
			m.checkLogs(t, *limitPods+further)
		})
	}
}

// startWith starts a node with an engine and the packages.
func startWith(t *testing.T, v engines.Version) machine {
	t.Helper()
	n := nodes.Start(t, nodes.Config{Engine: v})
	prepareNode(t, n)
	n.Copy(t, onlyFile(t, packaged(t, first, runtime.GOARCH), "*.deb"), "/tmp/"+first+".deb")
	m := machine{n, engines.Connect(t, "unix://"+n.Path("/run/cri-dockerd.sock"))}
	m.WriteFile(t, "/etc/cni/net.d/10-test.conflist", network, 0o644)
	m.apt(t, "install", "/tmp/"+first+".deb")
	m.awaitActive(t, all...)
	m.awaitStatus(t, "Ready, Docker "+string(v))
	engines.LoadBusybox(t, m.Path("/run/docker.sock"))

	return m
}

// exhaustPipePages holds more pipe pages than fs.pipe-user-pages-soft allows for root, until the
// test ends. CAP_SYS_ADMIN exempts the test from the limit, but its pages still count (pipe(7)).
func exhaustPipePages(t *testing.T) {
	t.Helper()
	soft := sysctl(t, "fs/pipe-user-pages-soft")
	largest := sysctl(t, "fs/pipe-max-size")
	for held := 0; held <= soft; held += largest / os.Getpagesize() {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}

		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		if _, err := unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, largest); err != nil {
			t.Fatalf("exhaust pipe pages: %v", err)
		}
	}
}

// exhaustInotify acquires every free inotify instance of root until free is called.
func exhaustInotify(t *testing.T) (free func()) {
	t.Helper()
	stop, stopped := make(chan struct{}), make(chan struct{})
	first := make(chan struct{})
	go func() {
		defer close(stopped)

		var held []int
		acquired := sync.OnceFunc(func() { close(first) })
		for tick := time.NewTicker(time.Millisecond); ; {
			for {
				fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
				if err != nil {
					break
				}
				held = append(held, fd)
			}

			acquired()
			select {
			case <-stop:
				tick.Stop()
				for _, fd := range held {
					unix.Close(fd)
				}
				return
			case <-tick.C:
			}
		}
	}()

	<-first
	free = sync.OnceFunc(func() { close(stop); <-stopped })
	t.Cleanup(free)

	return free
}

// sysctl returns a numeric kernel parameter.
func sysctl(t *testing.T, name string) int {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/proc/sys", name))
	if err != nil {
		t.Fatal(err)
	}

	n, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}

	return n
}

// startPrinters starts n pods, numbered from from. Their containers print limitLines lines, one
// each second.
func (m machine) startPrinters(t *testing.T, from, n int) {
	t.Helper()
	numbers := make(chan int)
	var running sync.WaitGroup
	for range starters {
		running.Go(func() {
			for i := range numbers {
				if err := m.startPrinter(t, i); err != nil {
					t.Errorf("pod %d: %v", i, err)
				}
			}
		})
	}

	for i := range n {
		numbers <- from + i
	}

	close(numbers)
	running.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

func (m machine) startPrinter(t *testing.T, i int) error {
	name := fmt.Sprint("printer-", i)
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: name, Namespace: "default", Uid: name},
		LogDirectory: "/var/log/pods/default_" + name + "_" + name,
	}

	s, err := m.cri.Runtime.RunPodSandbox(m.context(t), &runtimeapi.RunPodSandboxRequest{Config: cfg})
	if err != nil {
		return fmt.Errorf("RunPodSandbox: %w", err)
	}

	const script = `x=$(head -c %d /dev/zero | tr '\0' x); i=0
		while [ $i -lt %d ]; do printf '%%06d%%s\n' $i $x; i=$((i+1)); sleep 1; done; exec sleep 100000`
	c, err := m.cri.Runtime.CreateContainer(m.context(t), &runtimeapi.CreateContainerRequest{
		PodSandboxId:  s.PodSandboxId,
		SandboxConfig: cfg,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "printer"},
			Image:    &runtimeapi.ImageSpec{Image: engines.Busybox},
			LogPath:  "printer/0.log",
			Command:  []string{"sh", "-c", fmt.Sprintf(script, lineSize-6, limitLines)},
		},
	})
	if err != nil {
		return fmt.Errorf("CreateContainer: %w", err)
	}

	_, err = m.cri.Runtime.StartContainer(m.context(t), &runtimeapi.StartContainerRequest{ContainerId: c.ContainerId})

	return err
}

// awaitMessage waits until the message of a CRI status condition contains a text.
func (m machine) awaitMessage(t *testing.T, condition, text string) {
	t.Helper()
	m.Await(t, timeout, condition+" reports "+text, func() bool {
		return strings.Contains(m.message(t, condition), text)
	})
}

func (m machine) message(t *testing.T, condition string) string {
	t.Helper()
	s, err := m.cri.Runtime.Status(m.context(t), &runtimeapi.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}

	for _, c := range s.Status.Conditions {
		if c.Type == condition {
			return c.Message
		}
	}

	return ""
}

// checkPipeShortage checks that the shortage of pipe pages is reported and lines were spilled.
// There is no shortage if the units have CAP_SYS_RESOURCE.
func (m machine) checkPipeShortage(t *testing.T) {
	t.Helper()
	metrics := m.Run(t, "curl", "-s", "--unix-socket", "/run/docker/plugins/cri-dockerd.sock",
		"http://log-driver/metrics")
	spilled := regexp.MustCompile(`(?m)^cri_dockerd_log_spilled_frames_total (\S+)$`).FindStringSubmatch(metrics)
	if spilled == nil {
		t.Fatalf("no count of spilled frames in\n%s", metrics)
	}

	if ok, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0); err != nil || ok == 1 {
		t.Logf("the log-driver has CAP_SYS_RESOURCE (%v), %s frames were spilled", err, spilled[1])
		return
	}

	m.awaitMessage(t, "ContainerLogs", "fs.pipe-user-pages-soft")
	if spilled[1] == "0" {
		t.Error("no frame was spilled")
	}

	t.Logf("without CAP_SYS_RESOURCE, %s frames were spilled since the log-driver was killed", spilled[1])
}

// checkLogs waits until every pod's log has every line once.
func (m machine) checkLogs(t *testing.T, pods int) {
	t.Helper()
	began := time.Now()
	for i := range pods {
		name := fmt.Sprint("printer-", i)
		file := m.Path("/var/log/pods/default_" + name + "_" + name + "/printer/0.log")
		var lines []string
		for deadline := time.Now().Add(timeout); ; time.Sleep(100 * time.Millisecond) {
			if lines = wholeLines(t, file); len(lines) >= limitLines || time.Now().After(deadline) {
				break
			}
		}

		if len(lines) != limitLines {
			t.Errorf("%s: %d lines", name, len(lines))
		}

		for n, line := range lines {
			if want := fmt.Sprintf("%06d", n) + strings.Repeat("x", lineSize-6); line != want {
				t.Errorf("%s: line %d has %d bytes: %.20q", name, n, len(line), line)
			}
		}
	}

	t.Logf("%d lines of %d bytes, none lost or duplicated; waited %v for the last", pods*limitLines, lineSize,
		time.Since(began).Round(time.Second))
}

// wholeLines returns the lines of a log in the CRI format, joined from their parts.
func wholeLines(t *testing.T, file string) (lines []string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}

	line := ""
	for record := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSuffix(record, "\n"), " ", 4)
		if len(f) != 4 {
			continue // incomplete
		}

		line += f[3]
		if f[2] == "F" {
			lines, line = append(lines, line), ""
		}
	}

	return lines
}
