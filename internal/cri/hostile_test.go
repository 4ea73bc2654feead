package cri

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	grpcserver "cri-dockerd/internal/rpc"
	"cri-dockerd/internal/validate"
)

// kubeletLimit is the largest message in bytes accepted by a kubelet's client (maxMsgSize).
const kubeletLimit = 16 << 20

// hostileTexts may occur in any text from outside.
var hostileTexts = map[string]string{
	"invalid UTF-8":    "a\xff\xfe\xc3\x28\xed\xa0\x80b",
	"NUL":              "\x00\x00",
	"control":          "\x1b[2J\r\n\t\u202e\u2028",
	"one byte":         "\xc3",
	"quotes":           `"\'` + "`$(reboot)`%s%n%!(EXTRA",
	"1 MiB":            strings.Repeat("\xff<", 1<<19),
	"20 MiB":           strings.Repeat("x", 20<<20),
	"20 MiB, invalid":  strings.Repeat("\xf0\x9f", 10<<20),
	"many labels":      strings.Repeat("k=v,", 1<<16),
	"nothing":          "",
	"beyond the plane": "\U0010FFFF\U0001F511",
}

// hostileWorld returns a node with hostile text in all outside input: container and image
// properties from the engine, output of commands and, if failing is set, the error of each step.
func hostileWorld(t *testing.T, hostile string, failing bool) (conn *grpc.ClientConn, sandbox, container string) {
	t.Helper()
	s, w := newService(t)
	w.engine.Flood = []byte(hostile)
	w.engine.Distort = func(in *containerInspect) {
		if strings.Contains(in.Name, "_ended_") {
			in.State.Error = hostile
		}
	}

	w.logMode, w.logReason = "cri", hostile
	pod := w.pod()
	sandbox = runPod(t, s, pod)
	created, err := s.CreateContainer(t.Context(), createRequest(sandbox, pod))
	if err != nil {
		t.Fatal(err)
	}

	if _, err := s.StartContainer(t.Context(),
		&runtimeapi.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		t.Fatal(err)
	}

	ended := createRequest(sandbox, pod)
	ended.Config.Metadata.Name = "ended"
	other, err := s.CreateContainer(t.Context(), ended)
	if err != nil {
		t.Fatal(err)
	}

	addHostileImage(t, w, hostile)
	if err := s.View.Refresh(t.Context(), model.ContainerID(other.ContainerId)); err != nil {
		t.Fatal(err)
	}

	if err := s.ImageView.RefreshImages(t.Context()); err != nil {
		t.Fatal(err)
	}

	if failing {
		w.mu.Lock()
		w.fault = func(step string) error { return errors.New(step + ": " + hostile) }
		w.engineFault = func(verb string, _ bool) error { return errors.New(verb + ": " + hostile) }
		w.mu.Unlock()
	}

	return serveForKubelet(t, s), sandbox, created.ContainerId
}

type containerInspect = container.InspectResponse

func addHostileImage(t *testing.T, w *world, hostile string) {
	t.Helper()
	id := "sha256:" + strings.Repeat("f", 64)
	names := []string{hostile, "good:1"}
	in := image.InspectResponse{}
	if err := json.Unmarshal([]byte(`{"Config":{}}`), &in); err != nil {
		t.Fatal(err)
	}

	in.ID, in.RepoTags, in.RepoDigests = id, names, names
	in.Config.User, in.Config.Entrypoint, in.Config.Labels = hostile, []string{hostile},
		map[string]string{hostile: hostile, "k": hostile}
	err := w.engine.AddImage(image.Summary{ID: id, RepoTags: names, RepoDigests: names, Size: -1}, in)
	if err != nil {
		t.Fatal(err)
	}
}

// serveForKubelet serves a service through package rpc to a client with a kubelet's limits.
func serveForKubelet(t *testing.T, s *Service) *grpc.ClientConn {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}

	server := grpcserver.New(grpcserver.Services{
		Runtime:  s,
		Image:    s,
		Validate: validate.Request,
		Log:      slog.New(slog.DiscardHandler),
	})

	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	conn, err := grpc.NewClient(l.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(kubeletLimit)))
	if err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() {
		conn.Close()
		server.Stop(10 * time.Second)
		if err := <-served; err != nil {
			t.Error(err)
		}
	})

	return conn
}

// everyRPC returns all RPCs of the CRI from its descriptors, including future ones. The removing
// RPCs come last.
func everyRPC(t *testing.T) []protoreflect.MethodDescriptor {
	t.Helper()
	var all, last []protoreflect.MethodDescriptor
	for _, name := range []protoreflect.FullName{"runtime.v1.RuntimeService", "runtime.v1.ImageService"} {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(name)
		if err != nil {
			t.Fatal(err)
		}

		methods := d.(protoreflect.ServiceDescriptor).Methods() //nolint:forcetypeassert // it is one
		for i := range methods.Len() {
			m := methods.Get(i)
			if n := string(m.Name()); strings.HasPrefix(n, "Stop") || strings.HasPrefix(n, "Remove") {
				last = append(last, m)
			} else {
				all = append(all, m)
			}
		}
	}

	slices.SortFunc(last, func(a, b protoreflect.MethodDescriptor) int {
		return strings.Compare(string(b.Name()), string(a.Name()))
	})

	return append(all, last...)
}

// fill sets the fields naming existing objects.
func fill(m protoreflect.Message, sandbox, container string) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch f.Name() {
		case "pod_sandbox_id":
			m.Set(f, protoreflect.ValueOfString(sandbox))
		case "container_id":
			m.Set(f, protoreflect.ValueOfString(container))
		case "verbose", "stdout":
			m.Set(f, protoreflect.ValueOfBool(true))
		case "cmd":
			m.Mutable(f).List().Append(protoreflect.ValueOfString("flood"))
		case "image":
			if f.Kind() == protoreflect.MessageKind {
				m.Set(f, protoreflect.ValueOfMessage((&runtimeapi.ImageSpec{Image: testImage}).ProtoReflect()))
			}

		case "port":
			if f.IsList() {
				m.Mutable(f).List().Append(protoreflect.ValueOfInt32(80))
			}

		case "linux":
			if f.Kind() == protoreflect.MessageKind {
				m.Mutable(f)
			}
		}
	}
}

// request returns a valid request.
func request(t *testing.T, d protoreflect.MethodDescriptor, sandbox, container string) proto.Message {
	t.Helper()
	pod := &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{
		Name:      "new",
		Namespace: "default",
		Uid:       "new",
	}, LogDirectory: "/var/log/pods/new"}

	switch d.Name() {
	case "RunPodSandbox":
		return &runtimeapi.RunPodSandboxRequest{Config: pod}
	case "CreateContainer":
		r := createRequest(sandbox, pod)
		r.Config.Metadata.Name = "new"
		return r
	case "CheckpointContainer":
		return &runtimeapi.CheckpointContainerRequest{
			ContainerId: container,
			Location:    filepath.Join(t.TempDir(), "a.tar"),
		}
	}

	m := newMessage(t, d.Input())
	fill(m.ProtoReflect(), sandbox, container)

	return m
}

func newMessage(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return kind.New().Interface()
}

// call makes one call and returns its responses.
func call(
	t *testing.T, conn *grpc.ClientConn, d protoreflect.MethodDescriptor, req proto.Message,
) (answers []proto.Message, err error) {
	t.Helper()
	path := fmt.Sprintf("/%s/%s", d.Parent().FullName(), d.Name())
	if !d.IsStreamingServer() {
		answer := newMessage(t, d.Output())
		err := conn.Invoke(t.Context(), path, req, answer)
		return []proto.Message{answer}, err
	}

	ctx := t.Context()
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, path)
	if err != nil {
		return nil, err
	}

	if err := stream.SendMsg(req); err != nil {
		return nil, err
	}

	if err := stream.CloseSend(); err != nil {
		return nil, err
	}

	if d.Name() == "GetContainerEvents" { // it is endless; see TestHostileEvents
		_, err := stream.Header()
		return nil, err
	}

	for {
		answer := newMessage(t, d.Output())
		err := stream.RecvMsg(answer)
		if err != nil {
			return answers, ignoreEOF(err)
		}
		answers = append(answers, answer)
	}
}

func ignoreEOF(err error) error {
	if _, isStatus := status.FromError(err); isStatus {
		return err
	}
	return nil
}

// TestHostileTexts calls every RPC with hostile text in all outside input. Each response is valid
// text within the kubelet's limit. Failing steps return errors a kubelet can store.
func TestHostileTexts(t *testing.T) {
	for name, hostile := range hostileTexts {
		for _, failing := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, failing %t", name, failing), func(t *testing.T) {
				conn, sandbox, container := hostileWorld(t, hostile, failing)
				for _, d := range everyRPC(t) {
					responses, err := call(t, conn, d, request(t, d, sandbox, container))
					for _, r := range responses {
						if size := proto.Size(r); size > kubeletLimit {
							t.Errorf("%s returns %d bytes", d.Name(), size)
						}
					}

					checkStatus(t, d, err, failing)
				}
			})
		}
	}
}

func checkStatus(t *testing.T, d protoreflect.MethodDescriptor, err error, failing bool) {
	t.Helper()
	if err == nil {
		return
	}

	s := status.Convert(err)
	message := s.Message()
	if !utf8.ValidString(message) || len(message) > 16<<10 || strings.ContainsAny(message, "\x00\x1b") {
		t.Errorf("%s: error of %d bytes: %.200q", d.Name(), len(message), message)
	}

	if strings.Contains(message, "invalid UTF-8") || strings.Contains(message, "marshal") ||
		s.Code() == codes.ResourceExhausted {
		t.Errorf("%s has no response: %.200s", d.Name(), message)
	}

	// The container runs already, and without the containerd shim.
	refused := (d.Name() == "StartContainer" || d.Name() == "CheckpointContainer") &&
		s.Code() == codes.FailedPrecondition
	if !failing && !refused && s.Code() != codes.Unimplemented {
		t.Errorf("%s: %s: %.200s", d.Name(), s.Code(), message)
	}
}

// TestListsFit lists pods with annotations larger than a list. The list contains all pods with the
// fields needed by a kubelet. The status of each pod is complete.
func TestListsFit(t *testing.T) {
	s, w := newService(t)
	const pods = 40
	large := strings.Repeat("a", 500<<10)
	var last string
	for range pods {
		cfg := w.pod()
		cfg.Labels = map[string]string{"io.kubernetes.pod.name": cfg.Metadata.Name}
		cfg.Annotations = map[string]string{"large": large}
		last = runPod(t, s, cfg)
		r := createRequest(last, cfg)
		r.Config.Labels, r.Config.Annotations = cfg.Labels, cfg.Annotations
		c, err := s.CreateContainer(t.Context(), r)
		if err != nil {
			t.Fatal(err)
		}

		if _, err := s.StartContainer(t.Context(),
			&runtimeapi.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
			t.Fatal(err)
		}
	}

	conn := serveForKubelet(t, s)
	runtime := runtimeapi.NewRuntimeServiceClient(conn)
	sandboxes, err := runtime.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{})
	if err != nil || len(sandboxes.Items) != pods {
		t.Fatalf("%d sandboxes, %v", len(sandboxes.GetItems()), err)
	}

	whole := 0
	for _, sb := range sandboxes.Items {
		if sb.Labels["io.kubernetes.pod.name"] != sb.Metadata.Name {
			t.Errorf("labels %v", sb.Labels)
		}
		if len(sb.Annotations["large"]) > 0 {
			whole++
		}
	}

	if whole == 0 || whole == pods {
		t.Errorf("%d of %d items are complete", whole, pods)
	}

	if l, err := runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{}); err != nil ||
		len(l.Containers) != pods {
		t.Errorf("ListContainers: %v", err)
	}

	if l, err := runtime.ListContainerStats(t.Context(), &runtimeapi.ListContainerStatsRequest{}); err != nil ||
		len(l.Stats) != pods {
		t.Errorf("ListContainerStats: %v", err)
	}

	if l, err := runtime.ListPodSandboxStats(t.Context(), &runtimeapi.ListPodSandboxStatsRequest{}); err != nil ||
		len(l.Stats) != pods {
		t.Errorf("ListPodSandboxStats: %v", err)
	}

	one, err := runtime.PodSandboxStatus(t.Context(),
		&runtimeapi.PodSandboxStatusRequest{PodSandboxId: last, Verbose: true})
	if err != nil || one.Status.Annotations["large"] != large {
		t.Errorf("PodSandboxStatus: %v", err)
	}
}

// TestImagesFit lists an image with more names than fit into a response.
func TestImagesFit(t *testing.T) {
	var images []*runtimeapi.Image
	for i := range 100 {
		tags := slices.Repeat([]string{strings.Repeat("t", 200)}, 1000)
		images = append(images, &runtimeapi.Image{Id: fmt.Sprint(i), RepoTags: tags, RepoDigests: tags[:1]})
	}

	shared := images[0]
	fitImages(images, maxList)
	if size := proto.Size(&runtimeapi.ListImagesResponse{Images: images}); size > maxList || len(images) != 100 ||
		len(images[5].RepoTags) != 1 {
		t.Errorf("%d images of %d bytes", len(images), size)
	}

	if len(shared.RepoTags) != 1000 {
		t.Error("a shared image was modified")
	}
}

// TestExecSyncFits: the output of both streams exactly fills the kubelet's limit, and neither
// stream is lost.
func TestExecSyncFits(t *testing.T) {
	tests := []struct{ out, err, wantOut, wantErr int }{
		{10, 20, 10, 20},
		{outputLimit, 0, outputLimit, 0},
		{20 << 20, 20 << 20, outputLimit / 2, outputLimit - outputLimit/2},
		{20 << 20, 100, outputLimit - 100, 100},
		{100, 20 << 20, 100, outputLimit - 100},
	}

	for _, c := range tests {
		t.Run(fmt.Sprintf("%d and %d bytes", c.out, c.err), func(t *testing.T) {
			var budget outputBytes
			stdout, stderr := limitedBuffer{budget: &budget}, limitedBuffer{budget: &budget}
			stdout.Write(make([]byte, c.out)) //nolint:errcheck // a buffer
			stderr.Write(make([]byte, c.err)) //nolint:errcheck // a buffer
			out, errOut := truncateOutputs(stdout.bytes(), stderr.bytes(), outputLimit)
			if len(out) != c.wantOut || len(errOut) != c.wantErr {
				t.Errorf("%d and %d bytes were truncated to %d and %d", c.out, c.err, len(out), len(errOut))
			}

			if size := proto.Size(&runtimeapi.ExecSyncResponse{
				Stdout:   out,
				Stderr:   errOut,
				ExitCode: -1,
			}); size > kubeletLimit {
				t.Errorf("response of %d bytes", size)
			}
		})
	}
}
