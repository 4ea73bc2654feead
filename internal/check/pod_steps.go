package check

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/engine/pause"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shell"
)

// restart is the advice for failures without a known fix.
func restart() shell.Line {
	return shell.Advice("systemctl restart cri-docker, and read journalctl -u cri-docker")
}

func (t *podTest) steps() []step {
	return []step{
		{
			"daemon responds", "cri-dockerd is not running, or it listens on a different endpoint",
			shell.Advice("systemctl start cri-docker.socket cri-docker, or set --container-runtime-endpoint"),
			t.version,
		},
		{
			"Docker and the pod network ready", "the reason above",
			shell.Advice("resolve the reason above; for the pod network, install a network add-on or set " +
				"--network-plugin=kubenet --pod-cidr=10.244.0.0/24"),
			t.ready,
		},
		{
			"image loaded", "Docker does not respond at --docker-endpoint, or its disk is full",
			shell.Command("docker info; df -h"),
			t.loadImage,
		},
		{
			"sandbox started", "the pause container or the CNI plugins do not start",
			shell.Command("docker ps -a; ls /opt/cni/bin /usr/lib/cni").Then(restart()),
			t.runSandbox,
		},
		{
			"container created", "Docker rejects the container",
			shell.Command("journalctl -u docker -n 50"),
			t.create,
		},
		{
			"container started", "the OCI runtime cannot start processes",
			shell.Command("docker run --rm {} version", t.image),
			t.start,
		},
		{
			"HTTP request to the pod",
			"the node cannot reach its pods: a firewall, an overlapping address range, or bridge-nf rules",
			shell.Advice("iptables -P FORWARD ACCEPT; set another --pod-cidr if ip route shows the range in use"),
			t.fetch,
		},
		{
			"exec", "Docker cannot start another process in the container",
			shell.Command("docker exec").Then(restart()),
			t.exec,
		},
		{
			"logs with rotation",
			"the log-driver process does not write logs, or Docker's data root is not on this file system",
			shell.Advice("see condition ContainerLogs in crictl info, and docker info -f '{{.DockerRootDir}}'"),
			t.logs,
		},
		{
			"port-forward", "the streaming server is not reachable on loopback",
			shell.Advice("remove --streaming-bind-addr").Then(restart()),
			t.portForward,
		},
		{"pod stopped", "Docker cannot stop containers", shell.Command("journalctl -u docker -n 50"), t.stop},
		{"pod removed", "a resource of the pod is still in use", restart(), t.remove},
	}
}

func (t *podTest) version(ctx context.Context) (string, error) {
	v, err := t.cri.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %s, CRI %s", v.RuntimeName, v.RuntimeVersion, v.RuntimeApiVersion), nil
}

func (t *podTest) ready(ctx context.Context) (string, error) {
	s, err := t.cri.Status(ctx, &runtimeapi.StatusRequest{})
	if err != nil {
		return "", err
	}

	for _, c := range s.GetStatus().GetConditions() {
		// findings report the other conditions
		if !c.Status && (c.Type == runtimeapi.RuntimeReady || c.Type == runtimeapi.NetworkReady) {
			return "", fmt.Errorf("%s is false: %s", c.Type, c.Message)
		}
	}

	return "", nil
}

// loadImage loads an image with this program as its only file and waits until the daemon lists it.
func (t *podTest) loadImage(ctx context.Context) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}

	program, err := readStatic(self)
	if err != nil {
		return "", err
	}

	archive, err := pause.Archive(t.image, runtime.GOARCH, map[string][]byte{"cri-dockerd": program},
		[]string{"/cri-dockerd"}, nil)
	if err != nil {
		return "", err
	}

	if err := t.docker.LoadImage(ctx, bytes.NewReader(archive)); err != nil {
		return "", err
	}

	return t.image, eventually(ctx, eventualTimeout, func(ctx context.Context) error {
		r, err := t.images.ImageStatus(ctx,
			&runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: t.image}})
		if err == nil && r.GetImage() == nil {
			err = errors.New("the daemon does not list the image: it uses another Docker Engine")
		}
		return err
	})
}

// readStatic reads a statically linked program. The image contains no libraries.
func readStatic(file string) ([]byte, error) {
	program, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}

	f, err := elf.NewFile(bytes.NewReader(program))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}

	if slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return nil, fmt.Errorf("%s is not statically linked and cannot run in an image of its own: build it with "+
			"make build (CGO_ENABLED=0)", file)
	}

	return program, nil
}

func (t *podTest) runSandbox(ctx context.Context) (string, error) {
	t.ran = true
	r, err := t.cri.RunPodSandbox(ctx, &runtimeapi.RunPodSandboxRequest{Config: t.pod})
	if err != nil {
		return "", err
	}

	t.podID = r.PodSandboxId
	s, err := t.cri.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: t.podID})
	if err != nil {
		return "", err
	}

	if t.ip = s.GetStatus().GetNetwork().GetIp(); t.ip == "" {
		return "", errors.New("the pod has no IP address")
	}

	return "address " + t.ip, nil
}

func (t *podTest) create(ctx context.Context) (string, error) {
	r, err := t.cri.CreateContainer(ctx, &runtimeapi.CreateContainerRequest{
		PodSandboxId:  t.podID,
		SandboxConfig: t.pod,
		Config: &runtimeapi.ContainerConfig{
			Metadata: &runtimeapi.ContainerMetadata{Name: "page"},
			Image:    &runtimeapi.ImageSpec{Image: t.image},
			Args:     []string{pageCommand},
			LogPath:  "page.log",
			Linux: &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				ReadonlyRootfs:   true,
				NoNewPrivs:       true,
				RunAsUser:        &runtimeapi.Int64Value{Value: 65534},
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
				Capabilities:     &runtimeapi.Capability{DropCapabilities: []string{"ALL"}},
			}},
		},
	})

	t.containerID = r.GetContainerId()

	return "", err
}

func (t *podTest) start(ctx context.Context) (string, error) {
	_, err := t.cri.StartContainer(ctx, &runtimeapi.StartContainerRequest{ContainerId: t.containerID})
	return "", err
}

func (t *podTest) fetch(ctx context.Context) (string, error) {
	target := "http://" + net.JoinHostPort(t.ip, pagePort) + "/from-the-node"
	err := eventually(ctx, eventualTimeout, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
		if err != nil {
			return err
		}

		r, err := (&http.Client{Timeout: 3 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
		if err != nil {
			return err
		}
		defer r.Body.Close()

		b, err := io.ReadAll(io.LimitReader(r.Body, 1<<16))
		if err == nil && string(b) != page {
			err = fmt.Errorf("unexpected response from %s: %q", target, b)
		}

		return err
	})

	return target + "\n     " + strings.TrimSpace(page), err
}

func (t *podTest) exec(ctx context.Context) (string, error) {
	r, err := t.cri.ExecSync(ctx, &runtimeapi.ExecSyncRequest{
		ContainerId: t.containerID,
		Cmd:         []string{"/cri-dockerd", "version"},
		Timeout:     20,
	})
	if err == nil && (r.ExitCode != 0 || !strings.HasPrefix(string(r.Stdout), "cri-dockerd ")) {
		err = fmt.Errorf("exit code %d, output %q %q", r.ExitCode, r.Stdout, r.Stderr)
	}

	return strings.TrimSpace(string(r.GetStdout())), err
}

// logs waits for a line in the container's log, then rotates the log like the kubelet.
func (t *podTest) logs(ctx context.Context) (string, error) {
	file := filepath.Join(t.pod.LogDirectory, "page.log")
	err := eventually(ctx, eventualTimeout, func(context.Context) error {
		b, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(b), "/from-the-node") {
			err = fmt.Errorf("%s has no log line for the request", file)
		}
		return err
	})
	if err != nil {
		return "", err
	}

	format := "CRI format"
	if st, err := os.Lstat(file); err == nil && st.Mode()&os.ModeSymlink != 0 {
		format = "link to Docker's json-file log"
	}

	if err := os.Rename(file, file+".old"); err != nil {
		return "", err
	}

	if _, err := t.cri.ReopenContainerLog(ctx,
		&runtimeapi.ReopenContainerLogRequest{ContainerId: t.containerID}); err != nil {
		return "", err
	}

	_, err = os.Stat(file)

	return file + ", " + format, err
}

// portForward uses port-forward over WebSocket: each frame starts with its channel, 0 for data and
// 1 for errors.
func (t *podTest) portForward(ctx context.Context) (string, error) {
	r, err := t.cri.PortForward(ctx, &runtimeapi.PortForwardRequest{PodSandboxId: t.podID, Port: []int32{8080}})
	if err != nil {
		return "", err
	}

	u, err := url.Parse(r.Url)
	if err != nil {
		return "", err
	}

	u.Scheme = strings.Replace(u.Scheme, "http", "ws", 1) // TLS certificates are verified, like in the kubelet
	u.RawQuery = "port=" + pagePort
	d := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}, HandshakeTimeout: eventualTimeout}
	c, _, err := d.DialContext(ctx, u.String(), nil) //nolint:bodyclose // the connection owns it
	if err != nil {
		return "", fmt.Errorf("%s: %w", r.Url, err)
	}
	defer c.Close()

	if err := c.SetReadDeadline(time.Now().Add(eventualTimeout)); err != nil {
		return "", err
	}

	if err := c.WriteMessage(websocket.BinaryMessage, []byte("\x00GET /forwarded HTTP/1.0\r\n\r\n")); err != nil {
		return "", err
	}

	var response strings.Builder
	for !strings.Contains(response.String(), page) {
		_, m, err := c.ReadMessage()
		if err != nil {
			return "", fmt.Errorf("after %q: %w", response.String(), err)
		}

		if len(m) > 3 && m[0] == 1 {
			return "", errors.New(string(m[1:]))
		}
		if len(m) > 0 && m[0] == 0 {
			response.Write(m[1:])
		}
	}

	return "", nil
}

func (t *podTest) stop(ctx context.Context) (string, error) {
	_, err := t.cri.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: t.podID})
	return "", err
}

// remove removes the pod and verifies its removal from the daemon, Docker and the node.
func (t *podTest) remove(ctx context.Context) (string, error) {
	if _, err := t.cri.RemovePodSandbox(ctx, &runtimeapi.RemovePodSandboxRequest{PodSandboxId: t.podID}); err != nil {
		return "", err
	}

	if _, err := t.cri.PodSandboxStatus(ctx,
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: t.podID}); status.Code(err) != codes.NotFound {
		return "", fmt.Errorf("the daemon still reports the sandbox: %w", err)
	}

	for _, id := range []string{t.podID, t.containerID} {
		if _, err := t.docker.Inspect(ctx, model.ContainerID(id)); err == nil {
			return "", fmt.Errorf("container %s still exists in Docker", id)
		}
	}

	// A log file remains readable until the kubelet removes the pod's log directory. A link would
	// dangle.
	if st, err := os.Lstat(filepath.Join(t.pod.LogDirectory, "page.log")); err == nil && st.Mode()&os.ModeSymlink != 0 {
		return "", errors.New("the symbolic link of the log still exists")
	}

	if c, err := net.DialTimeout("tcp", net.JoinHostPort(t.ip, pagePort), 100*time.Millisecond); err == nil {
		return "", errors.Join(errors.New("the pod's IP address still accepts connections"), c.Close())
	}

	return "", nil
}
